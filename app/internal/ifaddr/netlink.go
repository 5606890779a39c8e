package ifaddr

import (
	"errors"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rtnl is a rtnetlink socket (rtnetlink(7)); all its words are in the machine's byte order.
type rtnl struct {
	fd  int
	seq uint32
	buf [64]uint64 // words: aligned for the headers
}

func openNetlink() (*rtnl, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	return &rtnl{fd: fd}, nil
}

func (n *rtnl) close() { unix.Close(n.fd) }

// message is RTM_NEWADDR or RTM_DELADDR with the attributes of one address.
type message struct {
	unix.NlMsghdr
	unix.IfAddrmsg
	attrs [3 * (unix.SizeofRtAttr + 16)]byte
}

var errShort = errors.New("netlink: the kernel's answer is not an acknowledgement")

// address sends a request of type typ about an address and returns the kernel's answer, an
// unix.Errno where it refuses.
func (n *rtnl) address(typ uint16, flags uint16, index uint32, p netip.Prefix) error {
	n.seq++
	var m message
	m.Type, m.NlMsghdr.Flags, m.Seq = typ, unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags, n.seq
	m.Family, m.Prefixlen, m.Index = unix.AF_INET, uint8(p.Bits()), index
	ip := p.Addr().AsSlice()
	if p.Addr().Is6() {
		m.Family = unix.AF_INET6
		m.IfAddrmsg.Flags = unix.IFA_F_NODAD
	}
	used := 0
	add := func(typ uint16, data []byte) {
		a := (*unix.RtAttr)(unsafe.Pointer(&m.attrs[used]))
		a.Len, a.Type = uint16(unix.SizeofRtAttr+len(data)), typ
		used += unix.SizeofRtAttr + copy(m.attrs[used+unix.SizeofRtAttr:], data) // addresses are multiples of 4 bytes
	}
	add(unix.IFA_LOCAL, ip)
	add(unix.IFA_ADDRESS, ip)
	if p.Addr().Is4() && p.Bits() < 31 {
		b := append([]byte(nil), ip...)
		for i := p.Bits(); i < 32; i++ {
			b[i/8] |= 0x80 >> uint(i%8)
		}
		add(unix.IFA_BROADCAST, b)
	}
	m.Len = uint32(unsafe.Offsetof(m.attrs)) + uint32(used)
	if err := n.send((*[unsafe.Sizeof(m)]byte)(unsafe.Pointer(&m))[:m.Len]); err != nil {
		return err
	}
	return n.answer()
}

func (n *rtnl) send(b []byte) error {
	for {
		if err := unix.Sendto(n.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != unix.EINTR {
			return err
		}
	}
}

// answer reads the acknowledgement of the last request.
func (n *rtnl) answer() error {
	for {
		got, _, err := unix.Recvfrom(n.fd, (*[unsafe.Sizeof(n.buf)]byte)(unsafe.Pointer(&n.buf))[:], 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		const need = unix.SizeofNlMsghdr + 4
		if got < need {
			return errShort
		}
		h := (*unix.NlMsghdr)(unsafe.Pointer(&n.buf))
		if h.Seq != n.seq {
			continue // of an earlier request
		}
		if h.Type != unix.NLMSG_ERROR {
			return errShort
		}
		if e := *(*int32)(unsafe.Pointer(&n.buf[unix.SizeofNlMsghdr/8])); e != 0 {
			return unix.Errno(-e)
		}
		return nil
	}
}
