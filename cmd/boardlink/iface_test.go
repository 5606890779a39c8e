package main

import (
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/trial/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// premade makes a persistent tap as an operator does for a program: of that MTU, with addresses, and up. owner is a user
// number, or 0.
func premade(t *testing.T, ns *netns.NS, name string, owner uint32, mtu int, addrs ...string) {
	t.Helper()
	err := ns.Do(func() error {
		l := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP, Owner: owner, Group: owner}
		if err := netlink.LinkAdd(l); err != nil {
			return err
		}
		if err := netlink.LinkSetMTU(l, mtu); err != nil {
			return err
		}
		for _, s := range addrs {
			a, err := netlink.ParseAddr(s)
			if err != nil {
				return err
			}
			a.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(l, a); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(l)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func removeLink(t *testing.T, ns *netns.NS, name string) {
	t.Helper()
	err := ns.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestUnprivilegedAgent: an agent of a user without rights, with a tap that was made for it. It asks for nothing that is so already, warns
// of what it may not do, and ends, with a line that says why, when the tap is taken away for good.
func TestUnprivilegedAgent(t *testing.T) {
	for _, c := range []struct {
		name       string
		mtu, want  int // of the tap; what both ends' frames go by at the agent
		agent      []string
		warning    string // a part of it
		addressFor bool
	}{
		{name: "as it is", mtu: 1400, want: 1400},
		{name: "its addresses are asked for", mtu: 1400, want: 1400, addressFor: true},
		{name: "a smaller MTU is kept", mtu: 1300, want: 1300},
		{name: "a larger one cannot be lowered", mtu: 1500, want: 1500, warning: "ip link set dev eth7 mtu 1400"},
		{name: "nor the one that is asked for", mtu: 1400, want: 1400, agent: []string{"--mtu", "1300"}, warning: "ip link set dev eth7 mtu 1300"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHand(t)
			premade(t, h.far, "eth7", 65534, c.mtu, "10.9.0.2/24", "fd09::2/64")
			h.arg["serve"] = append(h.arg["serve"], "--mode", "0666")
			if !c.addressFor {
				h.arg["agent"] = []string{"agent", "--board", "loopback:" + h.path("b"), "-i", "eth7", "--status", h.path("agent.sock"), "--beat", "20ms", "--lost", "100"}
			}
			h.arg["agent"] = append(h.arg["agent"], c.agent...)
			h.begin("serve")
			h.begin("host")
			until(t, 5*time.Second, "the rendezvous", func() bool { return strings.Contains(h.p["serve"].err.String(), "serving") })
			h.p["agent"] = h.start(h.far, "tun=0666 nobody", h.arg["agent"]...)
			h.waitUp()
			h.ping()
			if d := h.status("agent").Devices[0]; d.MTU != c.want {
				t.Errorf("MTU %d, want %d", d.MTU, c.want)
			}
			log := h.p["agent"].err.String()
			if n := strings.Count(log, "not permitted"); c.warning == "" && n != 0 || c.warning != "" && (n < 1 || n > 2 || !strings.Contains(log, c.warning)) {
				t.Errorf("%d warnings of what is not permitted; want one or two, with %q", n, c.warning)
			}
			if c.addressFor {
				removeLink(t, h.far, "eth7")
				code := h.p["agent"].end(0, 20*time.Second)
				lines := strings.Split(strings.TrimSpace(h.p["agent"].err.String()), "\n")
				if last := lines[len(lines)-1]; code != 1 || !strings.Contains(last, "cannot be made again") || !strings.Contains(last, "CAP_NET_ADMIN") {
					t.Errorf("ends with status %d and %q", code, last)
				}
				if n := strings.Count(h.p["agent"].err.String(), "eth7"); n > 10 {
					t.Errorf("%d lines of log", n)
				}
			}
		})
	}
}

// TestPremadeHost: the MTU of a tap that was made for a host is kept, and the board told; --mtu wins.
func TestPremadeHost(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		want int
	}{{"kept", nil, 1300}, {"chosen", []string{"--mtu", "1450"}, 1450}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHand(t)
			premade(t, h.ns, "bl0", 0, 1300)
			defer removeLink(t, h.ns, "bl0")
			h.arg["host"] = append([]string{"host", "--board", "loopback:" + h.path("b"), "-i", "bl0", "--addr", "10.9.0.1/24", "--addr", "fd09::1/64",
				"--status", h.path("host.sock"), "--beat", "20ms", "--lost", "100"}, c.args...)
			for _, s := range sides {
				h.begin(s)
			}
			h.waitUp()
			h.ping()
			for _, s := range []string{"host", "agent"} {
				if d := h.status(s).Devices[0]; d.MTU != c.want {
					t.Errorf("%s: MTU %d, want %d", s, d.MTU, c.want)
				}
			}
			for _, s := range []string{"agent", "host", "serve"} {
				h.stop(s)
			}
		})
	}
}
