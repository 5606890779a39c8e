//go:build linux

package hwtest

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
	"golang.org/x/sys/unix"
)

// TestVhostUserAgentDPDK: DPDK's vhost is the back end of an agent, and answers pings, over each kind of ring, with one and two queue pairs,
// whoever listens; it ends, or is killed, and comes back to the same agent. It received every ping, and no more than was sent.
func TestVhostUserAgentDPDK(t *testing.T) {
	dpdk, err := exec.LookPath("dpdk-testpmd")
	if err != nil {
		vmtest.Lacks(t, "dpdk-testpmd (Debian: apt-get install dpdk-dev)")
	}
	if netns.NeedsUser() {
		vmtest.Lacks(t, "root (CAP_NET_ADMIN, CAP_SYS_ADMIN)")
	}
	exe, err := programPath()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, ring, option string // of the socket
		pairs              int
		kill               bool
	}{
		{"split, killed", "split", "", 1, true},
		{"packed, two pairs, the agent listens", "packed", ",server", 2, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := shortDir(t)
			ns, err := netns.New()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { ns.Close() })
			e := end{t: t, side: "agent", ns: ns, socket: filepath.Join(dir, "status"), log: new(logBuffer)}
			e.logOnFailure()
			sock := filepath.Join(dir, "s")
			// testpmd answers from any address, and looks at checksums that nobody completes.
			a := exec.Command(exe, "agent", "--board", "vhost-user:"+sock+c.option, "-i", "bl0", "--addr", boardPrefix, "--ring", c.ring,
				"--queues", strconv.Itoa(c.pairs), "--no-offload", "--status", e.socket)
			a.Stdout, a.Stderr = e.log, e.log
			a.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			if err := ns.Start(a); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				a.Process.Signal(unix.SIGTERM)
				if err := a.Wait(); err != nil {
					t.Errorf("the agent ended badly: %v", err)
				}
			})
			sent := func(l status.Link) (n uint64) {
				for _, q := range l.Devices[0].Queues {
					if q.Index%2 == 1 {
						n += q.Pump["frames"]
					}
				}
				return n
			}
			for turn := 1; turn <= 2; turn++ {
				last := e.waitState(0, "without a back end", 20*time.Second, func(l status.Link) bool { return l.State != "up" && !l.Devices[0].Carrier })
				client := "client=0"
				if c.option == ",server" {
					client = "client=1"
				}
				p := exec.Command(dpdk, "--no-huge", "-m", "256", "--lcores", "0,1", "--no-pci", "--no-telemetry", "--file-prefix="+filepath.Base(dir),
					"--vdev", "net_vhost0,iface="+sock+",queues="+strconv.Itoa(c.pairs)+","+client, "--", "--forward-mode=icmpecho", "--auto-start", "--nb-cores=1",
					"--rxq="+strconv.Itoa(c.pairs), "--txq="+strconv.Itoa(c.pairs), "--total-num-mbufs=8192", "--no-mlockall")
				var out logBuffer
				p.Stdout, p.Stderr = &out, &out
				p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
				stdin, err := p.StdinPipe()
				if err == nil {
					err = p.Start()
				}
				if err != nil {
					t.Fatal(err)
				}
				ended := false
				t.Cleanup(func() {
					if !ended {
						p.Process.Kill()
						p.Wait()
					}
					if t.Failed() {
						t.Logf("testpmd:\n%s", &out)
					}
				})
				l := e.waitState(0, "up, with carrier", time.Minute, func(l status.Link) bool {
					return l.State == "up" && l.Devices[0].Carrier && l.Devices[0].Pairs == c.pairs
				})
				if has(l.Devices[0].Negotiated, "ring_packed") != (c.ring == "packed") || has(l.Devices[0].Negotiated, "mq") != (c.pairs > 1) || !has(l.Devices[0].Negotiated, "mtu") {
					t.Errorf("negotiated %v", l.Devices[0].Negotiated)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				addr := netip.MustParseAddr(hostIP)
				if err := traffic.WaitReachable(ctx, ns, addr); err != nil {
					t.Fatal(err)
				}
				r, err := traffic.Ping(ctx, ns, addr, traffic.PingConfig{Count: 200, Interval: time.Millisecond, Sizes: []int{56, 0, 1400}, Timeout: 5 * time.Second})
				if err != nil || r.Lost != 0 || r.Corrupt != 0 || r.Received != 200 {
					t.Fatalf("%+v, %v", r, err)
				}
				if c.kill && turn == 1 {
					p.Process.Kill()
				} else {
					stdin.Close()
				}
				p.Wait()
				ended = true
				l = e.waitState(0, "without the back end", 20*time.Second, func(l status.Link) bool { return l.State != "up" && !l.Devices[0].Carrier })
				if n := l.Counters; n["bring_ups"] != uint64(turn) || n["refused"]+n["malformed"]+n["unexpected"]+n["timeouts"]+n["failures"]+n["broken"] != 0 {
					t.Errorf("%v", n)
				}
				if c.kill && turn == 1 {
					os.Remove(sock) // a killed testpmd leaves it, and no other starts over it
					continue
				}
				m := regexp.MustCompile(`(?s)Accumulated forward statistics.*?RX-packets: (\d+)`).FindStringSubmatch(out.String())
				if m == nil {
					t.Fatal("testpmd says nothing of what it received")
				}
				// What the kernel sends by itself before testpmd forwards, or after, stays in the ring.
				got, _ := strconv.ParseUint(m[1], 10, 64)
				if n := sent(l) - sent(last); got < 200 || got > n {
					t.Errorf("%d frames were sent, testpmd received %d, want all of 200 pings and no more than were sent", n, got)
				}
			}
		})
	}
}
