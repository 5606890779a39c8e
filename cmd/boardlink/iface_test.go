package main

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
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

// occupy makes another interface of that name; release removes it.
func occupy(t *testing.T, b *box, name string) {
	t.Helper()
	link(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "peer"})(t, b)
}

func release(t *testing.T, b *box, name string) {
	t.Helper()
	removeLink(t, b.ns, name)
	b.ifcs = slices.DeleteFunc(b.ifcs, func(s string) bool { return s == name || s == name+"peer" })
}

// TestInterfaceOfOneBoard: a host with two boards, whose interface for one of them cannot be made, serves the other one with that
// undisturbed, shows what is wrong and tries on, and has both as soon as it can.
func TestInterfaceOfOneBoard(t *testing.T) {
	netnstest.Need(t)
	for _, c := range []struct {
		name, how string
		setup     func(t *testing.T, b *box) (mend func())
		nets      []string // further devices
		want      string   // in the status
	}{
		{name: "name taken", setup: func(t *testing.T, b *box) func() {
			occupy(t, b, "bl0")
			return func() { release(t, b, "bl0") }
		}},
		{name: "held by another process", setup: func(t *testing.T, b *box) func() {
			serve(t, b, "other")
			p := b.start(nil, "", "host", "--board", "loopback:"+b.path("other"), "-i", "bl0", "--status", "none")
			until(t, 10*time.Second, "another host", func() bool { return strings.Contains(p.err.String(), "board opened") })
			return func() { p.end(unix.SIGTERM, 5*time.Second) }
		}},
		{name: "not permitted", how: "tun=0666 nobody", want: "CAP_NET_ADMIN", setup: func(t *testing.T, b *box) func() {
			premade(t, b.ns, "bl1", 65534, 1500)
			b.ifcs = append(b.ifcs, "bl1")
			return func() { premade(t, b.ns, "bl0", 65534, 1500); b.ifcs = append(b.ifcs, "bl0") }
		}},
		{name: "second device", nets: []string{"board=0,name=bl2"}, setup: func(t *testing.T, b *box) func() {
			occupy(t, b, "bl2")
			return func() { release(t, b, "bl2") }
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			mend := c.setup(t, b)
			for _, name := range []string{"bad", "good"} {
				serve(t, b, name)
				if err := os.Chmod(b.path(name), 0o666); err != nil {
					t.Fatal(err)
				}
			}
			args := []string{"host", "--board", "loopback:" + b.path("bad"), "--board", "loopback:" + b.path("good"), "--status", b.path("h"),
				"--net", "board=0,name=bl0", "--net", "board=1,name=bl1"}
			for _, n := range c.nets {
				args = append(args, "--net", n)
			}
			far, err := netns.New()
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			h := b.start(nil, c.how, args...)
			a := b.start(far, "", "agent", "--board", "loopback:"+b.path("good"), "-i", "eth7", "--status", "none")
			var l []status.Link
			until(t, 20*time.Second, "one waits, one runs", func() bool {
				l = b.links("h")
				return len(l) == 2 && l[0].State == "waiting for the interface" && l[0].Counters["interface_errors"] >= 3 && up(l[1])
			})
			bad := "bl0"
			if c.nets != nil {
				bad = "bl2"
			}
			if !strings.Contains(l[0].LastError, bad) || !strings.Contains(l[0].LastError, c.want) || l[0].Name != "board0" {
				t.Errorf("status of %s: %q, want %q and %q", l[0].Name, l[0].LastError, bad, c.want)
			}
			if st, out, errs := b.run("", "status", b.path("h")); st != 0 || !strings.Contains(out, "waiting for the interface") {
				t.Errorf("status %d: %s%s", st, out, errs)
			}
			if n := strings.Count(h.err.String(), "cannot be made"); n != 1 {
				t.Errorf("%d lines about it", n)
			}
			if n := l[1].Counters["interface_errors"]; n != 0 {
				t.Errorf("%d errors at the other board", n)
			}
			epoch := l[1].Epoch
			mend()
			until(t, 20*time.Second, "the bad one is used, too", func() bool {
				l = b.links("h")
				return len(l) == 2 && l[0].State == "waiting for the peer" && len(l[0].Devices) == 1+len(c.nets) && l[0].LastError == ""
			})
			if !up(l[1]) || l[1].Epoch != epoch {
				t.Errorf("the other board was disturbed: %s, epoch %#x, was %#x", l[1].State, l[1].Epoch, epoch)
			}
			if n := strings.Count(h.err.String(), `msg="interface ready"`); n != 2+len(c.nets) {
				t.Errorf("%d lines of interfaces that are ready", n)
			}
			for _, p := range []*program{a, h} {
				if code := p.end(unix.SIGTERM, 5*time.Second); code != 0 {
					t.Errorf("ended with status %d:\n%s", code, p.err.String())
				}
			}
		})
	}
	t.Run("ends while it waits", func(t *testing.T) {
		t.Parallel()
		b := newBox(t)
		occupy(t, b, "bl0")
		serve(t, b, "bad")
		serve(t, b, "good")
		h := b.start(nil, "", "host", "--board", "loopback:"+b.path("bad"), "--board", "loopback:"+b.path("good"), "--status", b.path("h"),
			"--net", "board=0,name=bl0", "--net", "board=1,name=bl1")
		until(t, 20*time.Second, "it runs", func() bool { l := b.links("h"); return len(l) == 2 && l[1].State == "waiting for the peer" })
		if code := h.end(unix.SIGTERM, 5*time.Second); code != 0 {
			t.Errorf("ended with status %d:\n%s", code, h.err.String())
		}
	})
	// With nothing that can be served, and with input that no machine takes, it ends at once.
	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"one board", []string{"--board", "loopback:$D/bad", "-i", "bl0"}, []string{"bl0"}},
		{"none of two", []string{"--board", "loopback:$D/bad", "--board", "loopback:$D/good", "--net", "board=0,name=bl0", "--net", "board=1,name=bl2"}, []string{"bl0", "bl2"}},
		{"an impossible name", []string{"--board", "loopback:$D/bad", "--board", "loopback:$D/good", "--net", "board=0,name=bl1", "--net", "board=1,name=a/b"}, []string{"a/b"}},
		{"an impossible address", []string{"--board", "loopback:$D/bad", "--board", "loopback:$D/good", "--net", "board=0,name=bl1", "--net", "board=1,addr=224.0.0.1/4"}, []string{"224.0.0.1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			occupy(t, b, "bl0")
			occupy(t, b, "bl2")
			args := []string{"host", "--status", "none"}
			for _, a := range c.args {
				args = append(args, strings.ReplaceAll(a, "$D", b.dir))
			}
			st, _, errs := b.run("", args...)
			if st != exitUsage || strings.Count(errs, "\n") != 1 {
				t.Errorf("status %d, want %d and one line: %s", st, exitUsage, errs)
			}
			for _, w := range c.want {
				if !strings.Contains(errs, w) {
					t.Errorf("%q is not in: %s", w, errs)
				}
			}
		})
	}
}
