package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestTold: what is asked for and not given is told, once in the log and for as long as it is so in status: an MTU and queue
// pairs that the host does not have, a device that the other end does not have, an address that an interface
// kept.
func TestTold(t *testing.T) {
	netnstest.Need(t)
	t.Parallel()
	h := newHand(t)
	board := "loopback:" + h.path("b")
	h.arg["host"] = []string{"host", "--board", board, "--net", "name=bl0,addr=10.9.0.1/24", "--net", "name=bl1", "--status", h.path("host.sock"), "--beat", "20ms", "--lost", "100"}
	h.arg["agent"] = append(h.arg["agent"], "--mtu", "9000", "--queues", "2")
	for _, s := range sides {
		h.begin(s)
	}
	h.waitUp()
	told := func(side, what string) {
		t.Helper()
		until(t, 10*time.Second, side+" tells of "+what, func() bool {
			return strings.Contains(h.p[side].err.String(), what) && slices.ContainsFunc(h.status(side).Devices, func(d status.Device) bool {
				return slices.ContainsFunc(d.Notes, func(n string) bool { return strings.Contains(n, what) })
			})
		})
	}
	const mtu, pairs, alone = "the MTU is 1500, not the 9000", "queue pairs: 1, not the 2", "the agent does not drive this device"
	told("agent", mtu)
	told("agent", pairs)
	told("host", alone)
	if n := h.status("host").Devices[0].Notes; len(n) != 0 {
		t.Errorf("of a device that is driven: %q", n)
	}
	// A new handshake is no reason to say it again.
	ups := h.status("agent").Devices[0].Counters["ups"]
	h.stop("host")
	h.begin("host")
	until(t, 8*time.Second, "the device comes up again", func() bool { return h.isUp("agent") && h.status("agent").Devices[0].Counters["ups"] > ups })
	for _, what := range []string{mtu, pairs} {
		if n := strings.Count(h.p["agent"].err.String(), what); n != 1 {
			t.Errorf("%d lines of %q", n, what)
		}
	}
	if st, out, errs := h.run("", "status", h.path("agent.sock")); st != 0 || !strings.Contains(out, mtu) {
		t.Errorf("status %d: %s%s", st, out, errs)
	}
}

// TestPersistTellsOfOldAddresses: an interface that persists with the address of an earlier start.
func TestPersistTellsOfOldAddresses(t *testing.T) {
	netnstest.Need(t)
	t.Parallel()
	b := newBox(t)
	start := func(addrs ...string) string {
		t.Helper()
		args := []string{"host", "--status", "none", "--persist", "-i", "keep0", "--board", "loopback:" + b.path("none")}
		for _, a := range addrs {
			args = append(args, "--addr", a)
		}
		p := b.start(nil, "", args...)
		until(t, 8*time.Second, "the interface", func() bool { return strings.Contains(p.err.String(), "interface ready") })
		if code := p.end(unix.SIGHUP, 5*time.Second); code != 0 {
			t.Errorf("SIGHUP: status %d\n%s", code, p.err.String())
		}
		return p.err.String()
	}
	t.Cleanup(func() {
		b.ns.Do(func() error {
			hd, err := netlink.NewHandle()
			if err != nil {
				return err
			}
			defer hd.Close()
			l, err := hd.LinkByName("keep0")
			if err == nil {
				err = hd.LinkDel(l)
			}
			if err != nil {
				t.Error(err)
			}
			return nil
		})
	})
	if log := start("10.1.0.1/24", "fd01::1/64"); strings.Contains(log, "WARN") {
		t.Errorf("the first start: %s", log)
	}
	log := start("10.2.0.1/24", "fd01::1/64")
	if strings.Count(log, "which --addr does not give") != 1 || !strings.Contains(log, "ip addr del 10.1.0.1/24 dev keep0") {
		t.Errorf("another address: %s", log)
	}
	if log := start("10.1.0.1/24", "10.2.0.1/24", "fd01::1/64"); strings.Contains(log, "does not give") {
		t.Errorf("both addresses: %s", log)
	}
}
