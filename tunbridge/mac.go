package tunbridge

import (
	"fmt"
	"net"
)

// UnmarshalText reads an address as String prints it: six bytes, hexadecimal, with colons.
// Addresses that an interface cannot have (of a group, all zero) are refused.
func (m *MAC) UnmarshalText(b []byte) error {
	hw, err := net.ParseMAC(string(b))
	if err != nil || len(hw) != len(m) {
		return fmt.Errorf("%q is no MAC address: six bytes are needed, e.g. 02:00:00:00:00:01", b)
	}
	var v MAC
	copy(v[:], hw)
	if v[0]&1 != 0 || v == (MAC{}) {
		return fmt.Errorf("%s is no address of an interface: the first byte has to be even, and not all may be zero", v)
	}
	*m = v
	return nil
}
