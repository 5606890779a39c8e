package entropy

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/entropy"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/vring"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pool keeps what is mixed in.
type pool struct {
	mu     sync.Mutex
	bytes  []byte
	bits   int
	err    error // that Mix returns
	closed int
}

func (p *pool) Mix(b []byte, bits int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bytes, p.bits = append(p.bytes, b...), p.bits+bits
	return p.err
}

func (p *pool) Close() error {
	p.closed++
	return nil
}

func (p *pool) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.bytes)
}

// counting is a source whose n-th byte is n mod 251: what arrives shows what was lost or came twice.
type counting struct {
	mu sync.Mutex
	n  int
}

func (c *counting) fill(b []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range b {
		b[i] = byte(c.n % 251)
		c.n++
	}
	return nil
}

// ends runs both ends of a link over a board that models posted writes.
type ends struct {
	t    *testing.T
	spec string
	log  peer.Log
}

func (e *ends) host(d device.Device) (stop func()) {
	l := host.NewLink(host.Config{Name: "h", Board: e.spec, Devices: map[uint16]device.Device{100: d}, Log: &e.log, Beat: 10 * time.Millisecond, LostBeats: 200})
	return e.run("host", l.Run)
}

func (e *ends) agent(placement string, d driver.Driver) (stop func()) {
	l := agent.NewLink(agent.Config{Name: "a", Board: e.spec, Placement: placement, Devices: []driver.Driver{d}, Log: &e.log, Beat: 10 * time.Millisecond, LostBeats: 200})
	return e.run("agent", l.Run)
}

func (e *ends) run(side string, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			e.t.Errorf("%s: %v", side, err)
		}
	}
}

func (e *ends) until(what string, ok func() bool) {
	e.t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			e.t.Fatalf("%s does not happen; log:\n%s", what, &e.log)
		}
	}
}

// Random bytes reach the board's pool, each once and in order, in both placements, through restarts of either end.
func TestLink(t *testing.T) {
	for _, placement := range []string{"window", "push"} {
		placement := placement
		t.Run(placement, func(t *testing.T) {
			t.Parallel()
			e := &ends{t: t}
			_, e.spec = peer.NewBoard(t, testboard.PairOptions{})
			src := &counting{}
			newHost := func() device.Device {
				d, err := entropy.New(entropy.Config{Name: "rng0", Number: 100, Rate: entropy.MaxRate, Source: src.fill})
				if err != nil {
					t.Fatal(err)
				}
				return d
			}
			newAgent := func(p *pool) *Entropy {
				d, err := New(Config{Name: "rng0", Number: 100, Credit: 3, Interval: time.Microsecond, Pool: p})
				if err != nil {
					t.Fatal(err)
				}
				return d
			}
			p := &pool{}
			dev, drv := newHost(), newAgent(p)
			stopHost, stopAgent := e.host(dev), e.agent(placement, drv)
			more := func() {
				t.Helper()
				from := p.len()
				e.until("20 requests", func() bool { return p.len() >= from+20*Request })
			}
			more()
			stopHost()
			dev = newHost()
			stopHost = e.host(dev)
			more()
			stopAgent()
			src.mu.Lock()
			n := src.n // nobody asks any more
			src.mu.Unlock()
			if c := drv.Status().Counters; c["bytes"] != uint64(len(p.bytes)) || c["bits"] != uint64(p.bits) || p.bits != 3*len(p.bytes) || p.closed != 1 || c["ups"] != 2 {
				t.Errorf("%d bytes, %d bits, closed %d times, counters %v", len(p.bytes), p.bits, p.closed, c)
			}
			// At most one request was lost with each end.
			if n < len(p.bytes) || n > len(p.bytes)+2*Request {
				t.Errorf("%d bytes given, %d arrived", n, len(p.bytes))
			}
			for i, at := 0, 0; i < len(p.bytes); i, at = i+Request, at+Request {
				for skipped := 0; p.bytes[i] != byte(at%251) || p.bytes[i+Request-1] != byte((at+Request-1)%251); at += Request {
					if skipped++; skipped > 2 {
						t.Fatalf("bytes %d to %d do not follow: %d", i, i+Request, p.bytes[i:i+Request])
					}
				}
			}
			p = &pool{}
			stopAgent = e.agent(placement, newAgent(p))
			more()
			if c := dev.Status().Counters; c["broken"] != 0 || c["bytes"] < 40*Request {
				t.Errorf("counters %v", c)
			}
			stopAgent()
			stopHost()
		})
	}
}

// empty is a device that returns buffers without a byte in them.
type empty struct {
	*entropy.Entropy
	stop chan struct{}
	done chan struct{}
}

func (d *empty) StartQueue(_ int, r device.Resources, s vring.State) error {
	q, err := vring.NewSplitDevice(vring.Config{Name: "empty", Size: r.Size, Desc: r.Areas.Desc, Driver: r.Areas.Driver, Device: r.Areas.Device, Table: r.Table, State: s})
	if err != nil {
		return err
	}
	d.stop, d.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(d.done)
		for {
			select {
			case <-d.stop:
				return
			case <-time.After(time.Millisecond):
			}
			var b vring.Batch
			if n, err := q.Pop(&b, 1); err != nil || n == 0 {
				continue
			}
			if _, err := q.Settle([]vring.Used{{ID: b.Chains[0].ID, Count: 1}}, 0); err != nil {
				return
			}
		}
	}()
	return nil
}

func (d *empty) EnableQueue(int, bool, time.Time) error { return nil }
func (d *empty) SetRunning(bool, time.Time) error       { return nil }
func (d *empty) StopQueue(int, time.Time) (device.Stopped, error) {
	return device.Stopped{}, d.Reset(time.Time{})
}

func (d *empty) Reset(deadline time.Time) error {
	if d.stop != nil {
		close(d.stop)
		<-d.done
		d.stop = nil
	}
	return d.Entropy.Reset(deadline)
}

func (d *empty) Close() error { return d.Reset(time.Time{}) }

// A host that returns empty buffers, and a pool that takes nothing, are counted, and the device is reset for them again and again.
func TestBroken(t *testing.T) {
	full := errors.New("a pool that is full")
	for _, c := range []struct {
		name string
		make func(*entropy.Entropy) device.Device
		pool error
		want error
	}{
		{"empty buffer", func(e *entropy.Entropy) device.Device { return &empty{Entropy: e} }, nil, errEmpty},
		{"full pool", func(e *entropy.Entropy) device.Device { return e }, full, full},
	} {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := &ends{t: t}
			_, e.spec = peer.NewBoard(t, testboard.PairOptions{})
			dev, err := entropy.New(entropy.Config{Name: "rng0", Number: 100})
			if err != nil {
				t.Fatal(err)
			}
			drv, err := New(Config{Name: "rng0", Number: 100, Interval: time.Microsecond, Pool: &pool{err: c.pool}})
			if err != nil {
				t.Fatal(err)
			}
			stopHost, stopAgent := e.host(c.make(dev)), e.agent("window", drv)
			e.until("a second try", func() bool { return drv.Status().Counters["broken"] >= 2 })
			stopAgent()
			stopHost()
			if s := drv.Status(); s.Counters["bytes"] != 0 || !strings.Contains(s.LastError, c.want.Error()) {
				t.Errorf("%+v", s)
			}
		})
	}
}

// The kernel takes the bytes: without credit from everybody, with credit from root.
func TestKernelPool(t *testing.T) {
	k, err := openKernel(false)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Mix(make([]byte, Request), 0); err != nil {
		t.Error(err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	k, err = openKernel(true)
	if errors.Is(err, errCredit) {
		if os.Getenv("CI") == "true" && os.Geteuid() == 0 && !confined() {
			t.Errorf("root may not credit entropy: %v", err)
		}
		return // as it has to be without the right
	}
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.Mix(make([]byte, Request), 1); err != nil {
		t.Error(err)
	}
	if err := k.Mix(make([]byte, Request+1), 0); err == nil {
		t.Error("more than a request is taken")
	}
}

// confined tells whether the program lacks CAP_SYS_ADMIN in the first user namespace, which alone counts.
func confined() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil || strings.Join(strings.Fields(string(b)), " ") != "0 0 4294967295" {
		return true
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&hdr, &data[0]) != nil || data[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0
}

func TestConfig(t *testing.T) {
	for _, credit := range []int{-1, MaxCredit + 1} {
		if _, err := New(Config{Name: "rng0", Credit: credit, Pool: &pool{}}); err == nil || !strings.Contains(err.Error(), "rng0") {
			t.Errorf("credit %d: %v", credit, err)
		}
	}
}
