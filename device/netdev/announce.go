package netdev

import (
	"encoding/binary"
	"fmt"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/tunbridge"
	"golang.org/x/sys/unix"
)

var _ device.Announcer = (*Net)(nil)

// rarpLen is the length of an announcement in bytes: the shortest Ethernet frame without its
// checksum.
const rarpLen = 60

// rarp returns a RARP request (RFC 903) of the address for itself: what bridges and switches learn
// a station's place from.
func rarp(mac [6]byte) (b [rarpLen]byte) {
	for i := 0; i < 6; i++ {
		b[i] = 0xff
	}
	copy(b[6:], mac[:])
	binary.BigEndian.PutUint16(b[12:], 0x8035) // Ethernet type: RARP
	binary.BigEndian.PutUint16(b[14:], 1)      // hardware: Ethernet
	binary.BigEndian.PutUint16(b[16:], 0x0800) // protocol: IPv4
	b[18], b[19] = 6, 4                        // lengths of their addresses
	binary.BigEndian.PutUint16(b[20:], 3)      // reverse request
	copy(b[22:], mac[:])                       // of the sender ...
	copy(b[32:], mac[:])                       // ... for the sender
	return b
}

// Announce implements device.Announcer: it writes one RARP request to the interface, as if the
// driver had sent it.
func (n *Net) Announce(mac [6]byte) error {
	n.mu.Lock() // so that the interface is not made again meanwhile
	defer n.mu.Unlock()
	if n.ifc.Type() != tunbridge.TAP {
		return fmt.Errorf("%s: a tun device has no Ethernet frames", n.cfg.Name)
	}
	frame := rarp(mac)
	var header [tunbridge.HeaderLen]byte
	var iov []unix.Iovec
	if n.ifc.HeaderLen() != 0 {
		iov = append(iov, unix.Iovec{Base: &header[0]})
		iov[0].SetLen(len(header))
	}
	iov = append(iov, unix.Iovec{Base: &frame[0]})
	iov[len(iov)-1].SetLen(len(frame))
	if _, err := n.ifc.WriteV(iov); err != nil {
		return fmt.Errorf("%s: announce %v: %w", n.cfg.Name, tunbridge.MAC(mac), err)
	}
	return nil
}
