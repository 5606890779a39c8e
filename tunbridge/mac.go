package tunbridge

import (
	"fmt"
	"hash/fnv"
	"net"
)

// MAC is an Ethernet address in the order of the wire.
type MAC [6]byte

// String returns the address as six pairs of hexadecimal digits.
func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// StableMAC derives a locally administered unicast address from seed, such as the
// link's name and the side. The same seed gives the same address on every machine and
// in every release, so that neighbours keep their entries across a restart.
func StableMAC(seed string) MAC {
	h := fnv.New64a()
	h.Write([]byte(seed)) // never fails
	x := h.Sum64()
	// FNV leaves the high bits of short seeds alike: mix them (a bijection).
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	x ^= x >> 33
	var m MAC
	for i := range m {
		m[i] = byte(x >> uint(8*i))
	}
	m[0] = m[0]&^1 | 2 // unicast, locally administered (IEEE 802, 8.4)
	return m
}

// UnmarshalText reads an address as String prints it: six bytes, hexadecimal, with colons.
// Addresses that an interface cannot have (of a group, all zero) are refused.
func (m *MAC) UnmarshalText(b []byte) error {
	hw, err := net.ParseMAC(string(b))
	if err != nil || len(hw) != len(m) {
		return fmt.Errorf("%q is not a MAC address: six bytes are needed, e.g. 02:00:00:00:00:01", b)
	}
	var v MAC
	copy(v[:], hw)
	if v[0]&1 != 0 || v == (MAC{}) {
		return fmt.Errorf("%s is not an address of an interface: the first byte has to be even, and not all may be zero", v)
	}
	*m = v
	return nil
}
