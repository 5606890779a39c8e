package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/trial/traffic"
)

// TestVhostUserEnds joins host and agent by a vhost-user socket: TCP with every byte checked both
// ways, each side killed and started again, the end in order. The interface of the side that stays
// loses its carrier and keeps all else.
func TestVhostUserEnds(t *testing.T) {
	netnstest.Need(t)
	for _, c := range []struct {
		name        string
		host, agent string // options of the socket
		ring        string
		pairs       int
	}{
		{"split", "", "", "split", 1},
		{"packed, two pairs, the agent listens", ",client", ",server", "packed", 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHand(t)
			board := "vhost-user:" + h.path("v")
			queues := []string{"--queues", "1"}
			if c.pairs == 2 {
				queues[1] = "2"
			}
			h.arg["host"] = append([]string{"host", "--board", board + c.host, "-i", "bl0", "--addr", "10.9.0.1/24", "--addr", "fd09::1/64",
				"--status", h.path("host.sock")}, queues...)
			h.arg["agent"] = append([]string{"agent", "--board", board + c.agent, "-i", "eth7", "--addr", "10.9.0.2/24", "--addr", "fd09::2/64", "--ring", c.ring,
				"--status", h.path("agent.sock")}, queues...)
			up := func(what string) {
				t.Helper()
				until(t, 10*time.Second, what, func() bool {
					a, b := h.status("agent"), h.status("host")
					return a.State == "up" && b.State == "connected" && a.Devices[0].Carrier && b.Devices[0].Carrier &&
						a.Devices[0].Pairs == c.pairs && b.Devices[0].Pairs == c.pairs
				})
			}
			h.begin("agent")
			h.begin("host")
			up("both ends are up")
			mac := info(t, h.far, "eth7").mac
			d := h.status("agent").Devices[0]
			if has := strings.Join(d.Negotiated, " "); strings.Contains(has, "ring_packed") != (c.ring == "packed") || !strings.Contains(has, "host_tso4") || !strings.Contains(has, "mtu") {
				t.Errorf("negotiated: %s", has)
			}
			h.ping()
			board1, host1 := traffic.Endpoint{NS: h.far, Addr: netip.MustParseAddr("10.9.0.2")}, traffic.Endpoint{NS: h.ns, Addr: netip.MustParseAddr("10.9.0.1")}
			for _, ends := range [][2]traffic.Endpoint{{board1, host1}, {host1, board1}} {
				r, err := traffic.TCP(withTimeout(t, 20*time.Second), ends[0], ends[1], traffic.TCPConfig{Duration: 200 * time.Millisecond})
				if err != nil || r.Bytes == 0 {
					t.Errorf("TCP from %v: %+v, %v", ends[0], r, err)
				}
			}
			h.p["host"].kill()
			until(t, 10*time.Second, "the agent's interface has no carrier", func() bool { return !info(t, h.far, "eth7").up })
			h.begin("host")
			up("the host is there again")
			h.ping()
			h.p["agent"].kill()
			until(t, 10*time.Second, "the host's interface has no carrier", func() bool { return !info(t, h.ns, "bl0").up })
			h.begin("agent")
			up("the agent is there again")
			h.ping()
			if m := info(t, h.far, "eth7").mac; m != mac {
				t.Errorf("the agent's MAC address was %s, and is %s", mac, m)
			}
			h.stop("agent")
			until(t, 10*time.Second, "the host waits", func() bool {
				l := h.status("host")
				return l.State != "connected" && len(l.Devices) == 1 && !l.Devices[0].Carrier
			})
			if n := h.status("host").Counters; n["failed"] != 0 || n["unknown"] != 0 || n["queues_broken"] != 0 || n["queue_stops"] == 0 {
				t.Errorf("%v", n)
			}
			h.stop("host")
		})
	}
}

// TestVhostUserAgentInput: what an operator may get wrong is one line, and exit status 2.
func TestVhostUserAgentInput(t *testing.T) {
	b := newBox(t)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--board", "vhost-user:"}, "the path has 0 bytes"},
		{[]string{"--board", "vhost-user:x,client"}, `"client" is no option`},
		{[]string{"--board", "vhost-user:x,mode=0660"}, "mode is for a socket that this program makes"},
		{[]string{"--board", "vhost-user:fd=77"}, "descriptor 77 is not a socket"},
		{[]string{"--board", "vhost-user:" + b.path("none") + "/x,server"}, "cannot make a socket"},
		{[]string{"--board", "vhost-user:x", "--link", "tun"}, "vhost-user carries Ethernet frames"},
		{[]string{"--board", "vhost-user:x", "--net", "name=a", "--net", "name=b"}, "several devices"},
		{[]string{"--board", "vhost-user:x", "--placement", "push"}, "--placement push: not with a vhost-user back end"},
	} {
		st, _, errs := b.run("", append([]string{"agent", "--status", "none"}, c.args...)...)
		if st != 2 || !strings.Contains(errs, c.want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%q: status %d: %s", c.args, st, errs)
		}
	}
}
