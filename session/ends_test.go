package session_test

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/netdev"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/netdrv"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/trial/traffic"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// end is a host or an agent.
type end interface {
	Run(context.Context) error
	Status() status.Link
}

// link is a host and an agent that run in this process, over a board on which writes take their time.
type link struct {
	t         *testing.T
	pair      *testboard.Pair
	spec      string
	placement string
	queues    [2]int // pairs; 0: the default
	ring      string
	deaf      bool // the agent leaves its doorbells unheard
	ns        [2]*netns.NS
	ends      [2]end
	stop      [2]context.CancelFunc
	done      [2]chan error
	log       peer.Log
}

var addrs = [2]string{"10.77.0.1", "10.77.0.2"}

func newLink(t *testing.T, o testboard.PairOptions, placement string) *link {
	t.Helper()
	netnstest.Need(t)
	l := &link{t: t, placement: placement}
	l.pair, l.spec = peer.NewBoard(t, o)
	for s := range l.ns {
		var err error
		if l.ns[s], err = netns.New(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.ns[s].Close() })
	}
	t.Cleanup(func() {
		for _, s := range []board.Side{board.Host, board.Agent} {
			if l.stop[s] != nil {
				l.end(s)
			}
		}
		if t.Failed() {
			t.Logf("log of both ends:\n%s", &l.log)
		}
	})
	return l
}

// start starts a side, with an interface of its own.
func (l *link) start(s board.Side) {
	l.t.Helper()
	c := tunbridge.Config{Name: "bl0", MAC: tunbridge.MAC{2, 0, 0, 0, 7, byte(s)}, Offload: true}
	const beat, lost = 10 * time.Millisecond, 200 // a machine that is busy is not dead
	err := l.ns[s].Do(func() error {
		var ifc *tunbridge.Iface
		if s == board.Host {
			c.MTU, c.Queues = 1500, l.queues[s]
			n, err := netdev.New(netdev.Config{Name: "net0", Interface: c})
			if err != nil {
				return err
			}
			ifc = n.Interface()
			l.ends[s] = host.NewLink(host.Config{Name: "h", Board: l.spec, Options: board.Options{Account: new(dma.Account)}, Devices: map[uint16]device.Device{0: n}, Log: &l.log, Beat: beat, LostBeats: lost})
		} else {
			n, err := netdrv.New(netdrv.Config{Name: "net0", Interface: c, Queues: l.queues[s], Ring: l.ring, QueueSize: 64})
			if err != nil {
				return err
			}
			ifc = n.Interface()
			l.ends[s] = agent.NewLink(agent.Config{Name: "a", Board: l.spec, Options: board.Options{Account: new(dma.Account)}, Placement: l.placement, Devices: []driver.Driver{n}, Log: &l.log, Beat: beat, LostBeats: lost, NoInterrupts: l.deaf})
		}
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		nl, err := h.LinkByIndex(ifc.Index())
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addrs[s] + "/24")
		if err != nil {
			return err
		}
		if err := h.AddrAdd(nl, a); err != nil {
			return err
		}
		return h.LinkSetUp(nl)
	})
	if err != nil {
		l.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	e, done := l.ends[s], make(chan error, 1)
	l.stop[s], l.done[s] = cancel, done
	go func() { done <- e.Run(ctx) }()
}

// end stops a side.
func (l *link) end(s board.Side) {
	l.t.Helper()
	l.stop[s]()
	select {
	case err := <-l.done[s]:
		if err != nil {
			l.t.Errorf("the %s ends with %v", s, err)
		}
	case <-time.After(8 * time.Second):
		panic(fmt.Sprintf("the %s does not end", s))
	}
	l.stop[s] = nil
}

func (l *link) waitUp() {
	l.t.Helper()
	begin := time.Now()
	for {
		up := true
		for _, e := range l.ends {
			st := e.Status()
			up = up && st.State == "up" && st.Devices[0].Carrier
		}
		if up {
			return
		}
		if time.Since(begin) > 10*time.Second {
			l.t.Fatalf("the link does not come up: %+v; %+v", l.ends[0].Status(), l.ends[1].Status())
		}
		time.Sleep(time.Millisecond)
	}
}

func (l *link) at(s board.Side) traffic.Endpoint {
	return traffic.Endpoint{NS: l.ns[s], Addr: netip.MustParseAddr(addrs[s])}
}

// works passes pings of several sizes, nothing of which is to be lost.
func (l *link) works(ctx context.Context) {
	l.t.Helper()
	for _, s := range []board.Side{board.Host, board.Agent} {
		dst := l.at(s.Other()).Addr
		if err := traffic.WaitReachable(ctx, l.ns[s], dst); err != nil {
			l.t.Fatal(err)
		}
		r, err := traffic.Ping(ctx, l.ns[s], dst, traffic.PingConfig{Count: 20, Interval: 2 * time.Millisecond,
			Sizes: []int{56, 0, 1, 1472, 5000}, Timeout: 5 * time.Second, Peer: l.ns[s.Other()]})
		if err != nil || r.Lost != 0 || r.Corrupt != 0 || r.Sent != 20 {
			l.t.Fatalf("ping from the %s: %v, %+v", s, err, r)
		}
	}
}

func TestEnds(t *testing.T) {
	for _, o := range []testboard.PairOptions{
		{MaxDelay: 50 * time.Microsecond},
		{MaxDelay: 2 * time.Millisecond},
		{MaxDelay: 300 * time.Microsecond, Vectors: 1, Options: testboard.Options{Ordering: testboard.TSO, HostWindow: mmio.WriteCombining}},
		{MaxDelay: 300 * time.Microsecond, Options: testboard.Options{Ordering: testboard.Weak, AgentWindow: mmio.WriteCombining}},
		{MaxDelay: 300 * time.Microsecond, Options: testboard.Options{Ordering: testboard.Weak, HostWindow: mmio.WriteCombining, BoardMem: 512 << 10}},
	} {
		for _, placement := range []string{"window", "push"} {
			t.Run(fmt.Sprintf("%s, %v, %v, %s", placement, o.MaxDelay, o.Ordering, o.HostWindow), func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
				defer cancel()
				l := newLink(t, o, placement)
				l.start(board.Host)
				l.start(board.Agent)
				l.waitUp()
				if p := l.ends[board.Host].Status().Placement; p != placement {
					t.Errorf("placement %s", p)
				}
				l.works(ctx)
				for _, s := range []board.Side{board.Host, board.Agent} {
					r, err := traffic.TCP(ctx, l.at(s), l.at(s.Other()), traffic.TCPConfig{Duration: 150 * time.Millisecond, Grace: 20 * time.Second})
					if err != nil || r.Corrupt != 0 {
						t.Errorf("TCP from the %s: %v, %+v", s, err, r)
					}
				}
				l.works(ctx)
				for s, e := range l.ends {
					st := e.Status()
					if d := st.Devices[0]; d.Counters["broken"] != 0 || d.LastError != "" || st.Counters["link_ups"] != 1 {
						t.Errorf("the %s: %+v", board.Side(s), st)
					}
				}
			})
		}
	}
}

// TestBus: what the ends account is what the bus saw, and with placement push none of it is a read for a frame, in any area and
// direction: the reads are those of the control plane, and one before a sleep.
func TestBus(t *testing.T) {
	for _, placement := range []string{"window", "push"} {
		t.Run(placement, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			l := newLink(t, testboard.PairOptions{MaxDelay: 50 * time.Microsecond}, placement)
			l.start(board.Host)
			l.start(board.Agent)
			l.waitUp()
			l.works(ctx)
			var before [2]status.Link
			for s, e := range l.ends {
				before[s] = e.Status()
			}
			if _, err := traffic.TCP(ctx, l.at(board.Agent), l.at(board.Host), traffic.TCPConfig{Duration: 100 * time.Millisecond, Grace: 20 * time.Second}); err != nil {
				t.Error(err)
			}
			l.end(board.Agent)
			l.end(board.Host)
			for s, e := range l.ends {
				side := board.Side(s)
				st := e.Status()
				if got, want := st.Bus["reads"]+st.Bus["flush_reads"]+st.Bus["control_reads"], l.pair.Reads(side); got != want {
					t.Errorf("the %s accounts %d reads and did %d: %v", side, got, want, st.Bus)
				}
				for i, q := range st.Devices[0].Queues {
					b := q.Bus
					if b == nil {
						if placement == "push" || side == board.Host {
							t.Errorf("the %s, %s: nothing is accounted", side, q.Name)
						}
						continue
					}
					was := before[s].Devices[0].Queues[i].Bus
					if b.Driver.Writes+b.Device.Writes == 0 || was.Total().Writes >= b.Total().Writes {
						t.Errorf("the %s, %s: %+v after %+v", side, q.Name, *b, *was)
					}
					if placement == "window" {
						if b.Device.Reads != 0 || b.Descriptor.Reads == 0 || b.Driver.Reads == 0 || (b.Payload.Reads != 0) != (q.Name == "tx0") {
							t.Errorf("the %s, %s: %+v", side, q.Name, *b)
						}
						continue
					}
					if n := b.Total().Reads; n != 0 {
						t.Errorf("the %s, %s reads %d times: %+v", side, q.Name, n, *b)
					}
					if n := b.Total().FlushReads; n != q.Ring["flush_reads"] || n > q.Ring["arms"] || n == 0 && q.Ring["arms"] != 0 {
						t.Errorf("the %s, %s: %d reads to flush in %v", side, q.Name, n, q.Ring)
					}
				}
			}
		})
	}
}

// TestRestart stops or kills either end, again and again, and starts it anew.
func TestRestart(t *testing.T) {
	for _, placement := range []string{"window", "push"} {
		t.Run(placement, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			l := newLink(t, testboard.PairOptions{MaxDelay: 300 * time.Microsecond, Options: testboard.Options{Ordering: testboard.Weak}}, placement)
			l.start(board.Host)
			l.start(board.Agent)
			l.waitUp()
			l.works(ctx)
			rounds := 3
			if testing.Short() {
				rounds = 1
			}
			for n := 0; n < rounds; n++ {
				for _, s := range []board.Side{board.Host, board.Agent} {
					for _, kill := range []bool{false, true} {
						survivor := l.ends[s.Other()]
						ups := survivor.Status().Counters["link_ups"]
						if kill {
							peer.End(l.spec, s).Kill()
						}
						l.end(s)
						if !kill { // the other side was told
							for begin := time.Now(); survivor.Status().Devices[0].Carrier; time.Sleep(time.Millisecond) {
								if time.Since(begin) > time.Second {
									t.Fatal("the carrier stays on")
								}
							}
						}
						l.start(s)
						l.waitUp()
						l.works(ctx)
						if got := survivor.Status().Counters["link_ups"]; got != ups+1 {
							t.Errorf("round %d, %s, killed %v: up %d times, before %d", n, s, kill, got, ups)
						}
					}
				}
			}
			for s, e := range l.ends {
				if d := e.Status().Devices[0]; d.Counters["broken"] != 0 {
					t.Errorf("the %s: %+v", board.Side(s), d)
				}
			}
		})
	}
}
