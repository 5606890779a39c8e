package console

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/console"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/tty"
	"github.com/boardlink/boardlink/vring"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is an End whose two sides are the test's.
type memory struct {
	mu      sync.Mutex
	change  *sync.Cond
	toPrint []byte
	typed   []byte
	stalled bool // Write waits
	closed  bool
	keeps   bool
	size    tty.Size
	sizes   int
}

func newMemory() *memory {
	m := &memory{}
	m.change = sync.NewCond(&m.mu)
	return m
}

func (m *memory) print(b []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.toPrint = append(m.toPrint, b...)
	m.change.Broadcast()
}

func (m *memory) stall(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stalled = on
	m.change.Broadcast()
}

func (m *memory) got() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]byte(nil), m.typed...)
}

// left returns how many bytes nobody has read.
func (m *memory) left() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.toPrint)
}

func (m *memory) Read(b []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(m.toPrint) == 0 && !m.closed {
		m.change.Wait()
	}
	if m.closed {
		return 0, errClosed
	}
	n := copy(b, m.toPrint)
	m.toPrint = m.toPrint[n:]
	return n, nil
}

func (m *memory) Write(b []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.stalled && !m.closed {
		m.change.Wait()
	}
	if m.closed {
		return 0, errClosed
	}
	m.typed = append(m.typed, b...)
	return len(b), nil
}

func (m *memory) Resize(s tty.Size) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.size = s
	m.sizes++
}

func (m *memory) Keeps() bool                        { return m.keeps }
func (m *memory) Joined() string                     { return "a test" }
func (m *memory) State() (string, map[string]uint64) { return "", nil }

func (m *memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.change.Broadcast()
	return nil
}

// stream is words first, first+1, ... of 8 bytes, n bytes in all: each shows where it belongs.
func stream(first, n int) []byte {
	b := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], uint64(first+i/8))
	}
	return b
}

// ends runs both ends of a link over a board that models posted writes.
type ends struct {
	t    *testing.T
	spec string
	log  peer.Log
}

func (e *ends) host(d device.Device) (stop func()) {
	l := host.NewLink(host.Config{Name: "h", Board: e.spec, Devices: map[uint16]device.Device{64: d}, Log: &e.log, Beat: 10 * time.Millisecond, LostBeats: 200})
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

func (e *ends) model() *console.Console {
	e.t.Helper()
	d, err := console.New(console.Config{Name: "con0", Number: 64, Scrollback: 4 << 20})
	if err != nil {
		e.t.Fatal(err)
	}
	return d
}

func (e *ends) driver(end End) *Console {
	e.t.Helper()
	c, err := New(Config{Name: "con0", Number: 64, End: end})
	if err != nil {
		e.t.Fatal(err)
	}
	return c
}

// kept returns all that a console has printed.
func kept(t *testing.T, d *console.Console) []byte {
	t.Helper()
	n := int(d.Status().Counters["printed"])
	if n == 0 {
		return nil
	}
	p := make([]byte, n)
	term := d.Attach("test", -1)
	defer term.Close()
	if got, lost, err := term.Read(p); got != n || lost != 0 || err != nil {
		t.Fatal(got, n, lost, err)
	}
	return p
}

// Every byte arrives once and in order, both ways at the same time, in both placements. What is printed while there is no host is kept, the
// last of it where that is more than Backlog, with a note of what is missing; so it is with what is typed for an agent that starts
// again.
func TestLink(t *testing.T) {
	for _, placement := range []string{"window", "push"} {
		placement := placement
		t.Run(placement, func(t *testing.T) {
			t.Parallel()
			e := &ends{t: t}
			_, e.spec = peer.NewBoard(t, testboard.PairOptions{})
			const size = 512 << 10
			want := stream(0, size)
			dev, end := e.model(), newMemory()
			drv := e.driver(end)
			stopHost, stopAgent := e.host(dev), e.agent(placement, drv)
			typist := dev.Attach("typist", 0)
			if err := typist.Keyboard(false); err != nil {
				t.Fatal(err)
			}
			e.until("the device", func() bool { return drv.Status().Counters["ups"] == 1 })
			end.print(want)
			if n, err := typist.Write(want); n != size || err != nil {
				t.Fatal(n, err)
			}
			e.until("the stream's end", func() bool { return len(end.got()) == size && drv.Status().Counters["printed"] == size })
			if !bytes.Equal(end.got(), want) || !bytes.Equal(kept(t, dev), want) {
				t.Error("something else arrives")
			}
			dev.SetSize(132, 43)
			e.until("the size", func() bool { end.mu.Lock(); defer end.mu.Unlock(); return end.size == tty.Size{Cols: 132, Rows: 43} })

			stopHost()
			e.until("the device's end", func() bool { return drv.Status().Status != "ACKNOWLEDGE|DRIVER|FEATURES_OK|DRIVER_OK" })
			const more = Backlog + 32<<10
			end.print(stream(size/8, more))
			e.until("what is printed meanwhile", func() bool { return end.left() == 0 && drv.Status().Counters["printed_lost"] == more-Backlog })
			dev = e.model()
			dev.SetSize(80, 25)
			stopHost = e.host(dev)
			e.until("the backlog", func() bool { return drv.Status().Counters["printed"] > size+Backlog })
			note := fmt.Sprintf("\r\n[boardlink: %d bytes were dropped here while there was no link]\r\n", more-Backlog)
			if got := kept(t, dev); string(got) != note+string(stream((size+more-Backlog)/8, Backlog)) {
				t.Errorf("%d bytes arrive, %.100q", len(got), got)
			}
			e.until("the size at the start", func() bool { end.mu.Lock(); defer end.mu.Unlock(); return end.size == tty.Size{Cols: 80, Rows: 25} })

			stopAgent()
			if c := drv.Status().Counters; c["typed"] != size || c["typed_lost"] != 0 || c["printed_unsure"] != 0 || c["in_flight"] != 0 || c["ups"] != 2 || c["broken"] != 0 {
				t.Errorf("counters %v", c)
			}
			typist = dev.Attach("typist", 0)
			if err := typist.Keyboard(false); err != nil {
				t.Fatal(err)
			}
			if _, err := typist.Write([]byte("to whom it may concern")); err != nil {
				t.Fatal(err)
			}
			end = newMemory()
			stopAgent = e.agent(placement, e.driver(end))
			e.until("what was typed", func() bool { return string(end.got()) == "to whom it may concern" })
			if c := dev.Status().Counters; c["broken"] != 0 || c["typed_lost"] != 0 {
				t.Errorf("counters %v", c)
			}
			stopAgent()
			stopHost()
		})
	}
}

// An end that does not read holds up what is typed for it, and nothing else; it gets all of it later. Small buffers do as well.
func TestStalledEnd(t *testing.T) {
	t.Parallel()
	e := &ends{t: t}
	_, e.spec = peer.NewBoard(t, testboard.PairOptions{})
	dev, end := e.model(), newMemory()
	drv := e.driver(end)
	stopHost, stopAgent := e.host(dev), e.agent("window", drv)
	end.stall(true)
	const size = 4 * Backlog
	want := stream(0, size)
	typist := dev.Attach("typist", 0)
	if err := typist.Keyboard(false); err != nil {
		t.Fatal(err)
	}
	typed := make(chan error, 1)
	go func() {
		_, err := typist.Write(want)
		typed <- err
	}()
	e.until("a queue that is full", func() bool { return dev.Status().Counters["typed_waiting"] == 4096 && drv.in.room() < 4096 })
	end.print(want) // the device is up: it takes what is typed
	e.until("what is printed", func() bool { return drv.Status().Counters["printed"] == size })
	if !bytes.Equal(kept(t, dev), want) {
		t.Error("something else is printed")
	}
	end.stall(false)
	e.until("what is typed", func() bool { return len(end.got()) == size })
	if err := <-typed; err != nil || !bytes.Equal(end.got(), want) {
		t.Error("something else is typed", err)
	}
	stopAgent()
	stopHost()
}

// An end that keeps what it prints is not read without a link.
func TestKeeps(t *testing.T) {
	t.Parallel()
	e := &ends{t: t}
	_, e.spec = peer.NewBoard(t, testboard.PairOptions{})
	end := newMemory()
	end.keeps = true
	drv := e.driver(end)
	const size = 4 * Backlog
	want := stream(0, size)
	end.print(want)
	e.until("a full backlog", func() bool { return drv.out.room() == 0 })
	dev := e.model()
	stopHost, stopAgent := e.host(dev), e.agent("window", drv)
	e.until("what is printed", func() bool { return drv.Status().Counters["printed"] == size })
	if !bytes.Equal(kept(t, dev), want) || drv.Status().Counters["printed_lost"] != 0 {
		t.Errorf("something else is printed: %v", drv.Status().Counters)
	}
	stopAgent()
	stopHost()
}

// empty is a device that returns buffers without a byte in them.
type empty struct {
	*console.Console
	stop, done chan struct{}
}

func (d *empty) StartQueue(i int, r device.Resources, s vring.State) error {
	if i != toDriver {
		return nil
	}
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
	return d.Console.Reset(deadline)
}

func (d *empty) Close() error {
	if err := d.Reset(time.Time{}); err != nil {
		return err
	}
	return d.Console.Close()
}

// A host that returns empty buffers is counted, and the device is reset for it again and again.
func TestBroken(t *testing.T) {
	t.Parallel()
	e := &ends{t: t}
	_, e.spec = peer.NewBoard(t, testboard.PairOptions{})
	drv := e.driver(newMemory())
	stopHost, stopAgent := e.host(&empty{Console: e.model()}), e.agent("window", drv)
	e.until("a second try", func() bool { return drv.Status().Counters["broken"] >= 2 })
	stopAgent()
	stopHost()
	if s := drv.Status(); s.Counters["typed"] != 0 || !strings.Contains(s.LastError, errEmpty.Error()) {
		t.Errorf("%+v", s)
	}
}

// Whatever goes through a buffer, and however it is cut, comes out once and in order, but for the oldest bytes that had no room.
func TestBuffer(t *testing.T) {
	t.Parallel()
	b := newBuffer(100, func() {}, func() {})
	var want, got []byte
	p := make([]byte, 37)
	for i, n := 0, 0; i < 2000; i++ {
		s := bytes.Repeat([]byte{byte(i)}, i*7%61)
		if len(want)+len(s) > 100 {
			n = len(want) + len(s) - 100
		} else {
			n = 0
		}
		if d := b.put(s); d != n {
			t.Fatalf("put %d: %d bytes are dropped, want %d", i, d, n)
		}
		want = append(want, s...)[n:]
		k := b.take(p[:i*5%37])
		got, want = want[:k], want[k:]
		if !bytes.Equal(got, p[:k]) || b.room() != 100-len(want) {
			t.Fatalf("take %d: %d, want %d; %d are free", i, p[:k], got, b.room())
		}
	}
	s := stream(0, 800)
	if d := b.put(s); d != 700+len(want) {
		t.Errorf("%d bytes of a long one are dropped", d)
	}
	if p = make([]byte, 200); b.take(p) != 100 || !bytes.Equal(p[:100], s[700:]) {
		t.Errorf("%d", p)
	}
	b.setWait(true)
	done := make(chan int, 1)
	go func() { done <- b.put(s) }()
	all := []byte{}
	for len(all) < len(s) {
		all = append(all, p[:b.await(p[:33])]...)
	}
	if d := <-done; d != 0 || !bytes.Equal(all, s) {
		t.Errorf("%d dropped, %d", d, all)
	}
	go func() { done <- b.put(s) }()
	for b.room() != 0 {
		time.Sleep(time.Millisecond)
	}
	b.close()
	if d := <-done; d != 700 || b.await(p) != 0 {
		t.Errorf("%d dropped when closed", d)
	}
}
