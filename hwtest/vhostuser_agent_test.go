//go:build linux

package hwtest

import (
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// agentArgs are the flags of an agent that drives a device of a kind.
func (k pmdKind) agentArgs(sock string) []string {
	ring, deny := "split", []string{}
	if k.packed {
		ring = "packed"
	}
	if !k.mergeable {
		deny = append(deny, "mrg_rxbuf")
	}
	if !k.inOrder {
		deny = append(deny, "in_order")
	}
	a := []string{"--board", "vhost-user:" + sock, "-i", "bl0", "--mtu", strconv.Itoa(bounceMTU), "--ring", ring, "--queues", strconv.Itoa(k.pairs)}
	if len(deny) > 0 {
		a = append(a, "--deny", strings.Join(deny, ","))
	}
	return a
}

// TestVhostUserAgentDPDK: DPDK's vhost is the back end of an agent, over each kind of ring, whoever listens; it ends, is killed, and
// comes back to the same agent.
func TestVhostUserAgentDPDK(t *testing.T) {
	for i, k := range pmdKinds([]pmdKind{
		{mergeable: true, inOrder: true, pairs: 1}, {pairs: 4}, {packed: true, mergeable: true, inOrder: true, pairs: 4}, {packed: true, pairs: 1},
	}, false) {
		server := bits.OnesCount(uint(i))%2 == 1
		t.Run(fmt.Sprintf("%s, the agent listens: %v", k, server), func(t *testing.T) {
			t.Parallel()
			sock := filepath.Join(shortDir(t), "s")
			spec := sock
			if server {
				spec += ",server"
			}
			s := newSide(t, "agent", k.agentArgs(spec)...)
			for i := 0; i < *roundFlag; i++ {
				before := s.alone()
				p := startPMD(t, s.ns, fmt.Sprintf("net_vhost0,iface=%s,queues=%d,client=%s", sock, k.pairs, onOff(server)), k)
				s.up(k)
				p.forwards()
				bounce(t, s.ns)
				if i%2 == 1 {
					p.kill()
					if !server {
						os.Remove(sock) // a killed testpmd leaves it, and no other starts over it
					}
				} else {
					p.end(bounceFrames)
				}
				s.moved(before, s.alone(), bounceFrames)
			}
		})
	}
}

// TestVhostUserAgentRestarts: DPDK's vhost goes on while the agent ends, is killed, and comes back.
func TestVhostUserAgentRestarts(t *testing.T) {
	for _, k := range []pmdKind{{mergeable: true, inOrder: true, pairs: 1}, {packed: true, pairs: 4}} {
		t.Run(k.String(), func(t *testing.T) {
			t.Parallel()
			sock := filepath.Join(shortDir(t), "s")
			p := startPMD(t, quiet(t), fmt.Sprintf("net_vhost0,iface=%s,queues=%d", sock, k.pairs), k)
			s := newSide(t, "agent", k.agentArgs(sock)...)
			s.restarts(p, k)
			p.end(*roundFlag * bounceFrames)
		})
	}
}
