//go:build linux

package trial_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// within runs f in a namespace, with the interface of that name in it.
func within(t testing.TB, ns *netns.NS, name string, f func(h *netlink.Handle, l netlink.Link) error) {
	t.Helper()
	err := ns.Do(func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		l, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		return f(h, l)
	})
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// seen is what the kernel tells of an interface.
type seen struct {
	there, up, carrier bool
	mtu, index         int
	mac                string
	addrs              map[string]bool // those that can be used
}

func look(t testing.TB, ns *netns.NS, name string) (s seen) {
	t.Helper()
	err := ns.Do(func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		l, err := h.LinkByName(name)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return nil
		}
		if err != nil {
			return err
		}
		list, err := h.AddrList(l, netlink.FAMILY_ALL)
		if err != nil && !errors.Is(err, unix.ENODEV) { // removed meanwhile
			return err
		}
		a := l.Attrs()
		s = seen{there: true, up: a.RawFlags&unix.IFF_UP != 0, carrier: a.RawFlags&unix.IFF_LOWER_UP != 0, mtu: a.MTU, index: a.Index,
			mac: a.HardwareAddr.String(), addrs: map[string]bool{}}
		for _, a := range list {
			if a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 {
				s.addrs[a.IPNet.String()] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// wait waits until an interface is as it should be.
func wait(t testing.TB, ns *netns.NS, name, what string, ok func(s seen) bool) seen {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		s := look(t, ns, name)
		if ok(s) {
			return s
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not within 10 s: %s: %+v", name, what, s)
		}
	}
}

var configured = [2][]string{board.Host: {"10.66.0.1/24", "fd66::1/64"}, board.Agent: {"10.66.0.2/24", "fd66::2/64"}}

func (s seen) has(addrs []string) bool {
	for _, a := range addrs {
		if !s.addrs[a] {
			return false
		}
	}
	return true
}

// Somebody removes the interface of a running end, again and again, under traffic: each time it is made again, with its addresses,
// MTU, MAC address and queues, and traffic goes on.
func TestInterfaceRemoved(t *testing.T) {
	netnstest.Need(t)
	for _, side := range []board.Side{board.Host, board.Agent} {
		for _, c := range []trial.Config{
			{Offload: true, MTU: 1400}, {Offload: true, Queues: 4, Persist: true}, {Link: "tun"},
		} {
			t.Run(fmt.Sprintf("%v %s queues=%d persist=%v", side, c.Link, c.Queues, c.Persist), func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				r := start(t, c)
				l := startLoad(t, ctx, r)
				l.flows(t, r, 5*time.Second)
				ns, name := r.NS(side), trial.Interface(0)
				before := look(t, ns, name)
				const times = 2
				for n := 1; n <= times; n++ {
					index := look(t, ns, name).index
					within(t, ns, name, func(h *netlink.Handle, l netlink.Link) error { return h.LinkDel(l) })
					after := wait(t, ns, name, "is made again", func(s seen) bool {
						return s.there && s.index != index && s.up && s.carrier && s.has(configured[side])
					})
					if after.mtu != before.mtu || after.mac != before.mac {
						t.Errorf("made again with MTU %d and MAC %s, it had %d and %s", after.mtu, after.mac, before.mtu, before.mac)
					}
					l.flows(t, r, 5*time.Second)
				}
				l.stop(t)
				waitUp(t, r)
				d := getStatus(t, r, side).Links[0].Devices[0]
				if d.Counters["remade"] != times || d.Counters["broken"] != 0 || d.LastError != "" || !d.Carrier || d.Pairs != max(1, c.Queues) {
					t.Errorf("status: counters %v, last error %q, carrier %v, %d pairs", d.Counters, d.LastError, d.Carrier, d.Pairs)
				}
				for _, s := range []board.Side{board.Host, board.Agent} {
					if n := strings.Count(r.Log(s), "\n"); n > 15+6*times {
						t.Errorf("%d lines of log at the %v", n, s)
					}
				}
				if n := strings.Count(r.Log(side), "somebody removed the interface"); n != times {
					t.Errorf("%d lines of %d removals", n, times)
				}
			})
		}
	}
}

// The name of the removed interface is taken: the end tries on, in silence, and has it as soon as it is free.
func TestInterfaceRemovedNameTaken(t *testing.T) {
	t.Parallel()
	r := start(t, trial.Config{Offload: true})
	ns, name := r.NS(board.Host), trial.Interface(0)
	within(t, ns, name, func(h *netlink.Handle, l netlink.Link) error {
		p, err := stranger(h, "taken", netlink.TUNTAP_MODE_TUN)
		if err != nil {
			return err
		}
		if err := h.LinkSetDown(l); err != nil {
			return err
		}
		if err := h.LinkSetName(l, "old"); err != nil {
			return err
		}
		if err := h.LinkSetName(p, name); err != nil {
			return err
		}
		return h.LinkDel(l)
	})
	for end := time.Now().Add(10 * time.Second); getStatus(t, r, board.Host).Links[0].Devices[0].LastError == ""; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("status does not tell")
		}
	}
	time.Sleep(500 * time.Millisecond) // some more tries
	if s := look(t, ns, name); s.mtu != 1234 || s.up {
		t.Errorf("the stranger was changed: %+v", s)
	}
	d := getStatus(t, r, board.Host).Links[0].Devices[0]
	if !strings.Contains(d.LastError, name) || d.Counters["remade"] != 0 {
		t.Errorf("last error %q, counters %v", d.LastError, d.Counters)
	}
	within(t, ns, name, func(h *netlink.Handle, l netlink.Link) error { return h.LinkDel(l) })
	wait(t, ns, name, "is made again", func(s seen) bool { return s.there && s.carrier && s.has(configured[board.Host]) })
	waitUp(t, r)
	if n := strings.Count(r.Log(board.Host), "cannot be made again"); n < 1 || n > 2 {
		t.Errorf("%d lines tell that it cannot be made", n)
	}
}

// stranger makes somebody else's tap or tun.
func stranger(h *netlink.Handle, name string, mode netlink.TuntapMode) (netlink.Link, error) {
	if err := h.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: mode}); err != nil {
		return nil, err
	}
	l, err := h.LinkByName(name)
	if err != nil {
		return nil, err
	}
	return l, h.LinkSetMTU(l, 1234)
}

// The interface goes to another namespace, as eth0, where it came from there is another eth0, and the other end starts again
// with another MTU: the link's own interface follows, the other one stays as it is.
func TestInterfaceMoved(t *testing.T) {
	netnstest.Need(t)
	for _, side := range []board.Side{board.Host, board.Agent} {
		t.Run(side.String(), func(t *testing.T) {
			t.Parallel()
			r := start(t, trial.Config{Offload: true, MTU: 1400})
			to, err := netns.New()
			if err != nil {
				t.Fatal(err)
			}
			defer to.Close()
			within(t, r.NS(side), trial.Interface(0), func(h *netlink.Handle, l netlink.Link) error {
				if _, err := stranger(h, "eth0", netlink.TUNTAP_MODE_TAP); err != nil {
					return err
				}
				return h.LinkSetNsFd(l, to.FD())
			})
			within(t, to, trial.Interface(0), func(h *netlink.Handle, l netlink.Link) error {
				if err := h.LinkSetName(l, "eth0"); err != nil {
					return err
				}
				a, _ := netlink.ParseAddr(configured[side][0])
				if err := h.AddrAdd(l, a); err != nil {
					return err
				}
				return h.LinkSetUp(l)
			})
			before := look(t, r.NS(side), "eth0")
			own := 1400
			if side == board.Agent {
				// The host starts again, with another MTU, which the agent sets.
				own = 1300
				if err := r.Terminate(board.Host, 5*time.Second); err != nil {
					t.Fatal(err)
				}
				r.SetMTU(own)
				if err := r.StartSide(board.Host); err != nil {
					t.Fatal(err)
				}
			} else {
				// The agent starts again and is told the MTU.
				if err := r.Terminate(board.Agent, 5*time.Second); err != nil {
					t.Fatal(err)
				}
				if err := r.StartSide(board.Agent); err != nil {
					t.Fatal(err)
				}
			}
			waitUp(t, r)
			wait(t, to, "eth0", "has a carrier and its MTU", func(s seen) bool { return s.carrier && s.mtu == own })
			wait(t, r.NS(side.Other()), trial.Interface(0), "has a carrier and its MTU", func(s seen) bool { return s.carrier && s.mtu == own })
			if after := look(t, r.NS(side), "eth0"); fmt.Sprint(after) != fmt.Sprint(before) {
				t.Errorf("the other eth0 was %+v, and is %+v", before, after)
			}
			if d := getStatus(t, r, side).Links[0].Devices[0]; d.Interface != "eth0" || d.MTU != own {
				t.Errorf("status: interface %s, MTU %d; want eth0, %d", d.Interface, d.MTU, own)
			}
			// Frames pass.
			err = r.NS(side.Other()).Do(func() error {
				c, err := net.Dial("udp4", strings.Split(configured[side][0], "/")[0]+":9")
				if err != nil {
					return err
				}
				defer c.Close()
				for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
					c.Write([]byte("x"))
					if _, err := c.Read(make([]byte, 1)); errors.Is(err, syscall.ECONNREFUSED) {
						return nil // the other end's kernel answered
					}
					if time.Now().After(end) {
						return errors.New("no answer")
					}
				}
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// An end whose interface is set down shows at the other end as no carrier; set up again both are as before, with all addresses.
func TestInterfaceDown(t *testing.T) {
	netnstest.Need(t)
	for _, side := range []board.Side{board.Host, board.Agent} {
		t.Run(side.String(), func(t *testing.T) {
			t.Parallel()
			r := start(t, trial.Config{Offload: true})
			ns, far, name := r.NS(side), r.NS(side.Other()), trial.Interface(0)
			for n := 0; n < 2; n++ {
				within(t, ns, name, func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetDown(l) })
				wait(t, far, name, "no carrier", func(s seen) bool { return s.up && !s.carrier })
				if s := look(t, ns, name); s.up || s.addrs[configured[side][1]] {
					t.Errorf("set down: %+v", s)
				}
				if d := getStatus(t, r, side.Other()).Links[0].Devices[0]; d.Carrier {
					t.Error("status tells of a carrier")
				}
				within(t, ns, name, func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetUp(l) })
				wait(t, far, name, "carrier", func(s seen) bool { return s.carrier })
				wait(t, ns, name, "addresses and carrier", func(s seen) bool { return s.carrier && s.has(configured[side]) })
			}
			waitUp(t, r)
			for _, s := range []board.Side{board.Host, board.Agent} {
				if l := getStatus(t, r, s).Links[0]; l.Devices[0].Counters["starts"]+l.Devices[0].Counters["ups"] != 1 {
					t.Errorf("the device of the %v was set up again: %v", s, l.Devices[0].Counters)
				}
			}
		})
	}
}

// Below an MTU of 1280 the kernel removes IPv6 addresses: they come back with the MTU.
func TestSmallMTU(t *testing.T) {
	t.Parallel()
	r := start(t, trial.Config{Offload: true})
	for _, side := range []board.Side{board.Host, board.Agent} {
		ns, name := r.NS(side), trial.Interface(0)
		for n := 0; n < 2; n++ {
			within(t, ns, name, func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetMTU(l, 1200) })
			if s := look(t, ns, name); s.addrs[configured[side][1]] || !s.addrs[configured[side][0]] {
				t.Fatalf("with an MTU of 1200: %+v", s)
			}
			time.Sleep(50 * time.Millisecond) // seen as a change of its own, and not made up for too early
			within(t, ns, name, func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetMTU(l, 1500) })
			wait(t, ns, name, "addresses", func(s seen) bool { return s.has(configured[side]) })
		}
	}
	// By the host's MTU: the agent comes up without, tells why, and has them with the next host.
	for _, mtu := range []int{1200, 1500} {
		if err := r.Terminate(board.Host, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		r.SetMTU(mtu)
		if err := r.StartSide(board.Host); err != nil {
			t.Fatal(err)
		}
		waitUp(t, r)
		s := wait(t, r.NS(board.Agent), trial.Interface(0), "MTU", func(s seen) bool {
			return s.mtu == mtu && s.addrs[configured[board.Agent][1]] == (mtu >= 1280)
		})
		if !s.addrs[configured[board.Agent][0]] {
			t.Errorf("MTU %d: %+v", mtu, s)
		}
	}
	if n := strings.Count(r.Log(board.Agent), "IPv6 needs an MTU of 1280"); n != 3 {
		t.Errorf("%d of 3 warnings at the agent", n)
	}
}
