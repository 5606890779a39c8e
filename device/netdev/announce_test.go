package netdev

import (
	"encoding/hex"
	"testing"
)

// TestRARP holds an announcement to the layout of RFC 903.
func TestRARP(t *testing.T) {
	b := rarp([6]byte{0x52, 0x54, 0, 1, 2, 3})
	const want = "ffffffffffff" + "525400010203" + "8035" + // to all, from the address, RARP
		"0001" + "0800" + "06" + "04" + "0003" + // Ethernet, IPv4, lengths, reverse request
		"525400010203" + "00000000" + "525400010203" + "00000000" +
		"000000000000000000000000000000000000"
	if got := hex.EncodeToString(b[:]); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
