package entropy

import (
	"errors"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/internal/plain"
	"github.com/boardlink/boardlink/device/internal/plaintest"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ones is a source that fills with 1s.
func ones(b []byte) error {
	for i := range b {
		b[i] = 1
	}
	return nil
}

// rig returns a model with 4 MiB of memory. The source gives 1s.
func rig(t testing.TB, c Config) (*Entropy, *plaintest.Rig) {
	t.Helper()
	c.Name = "rng0"
	if c.Source == nil {
		c.Source = ones
	}
	e, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return e, plaintest.New(t, e, plain.Features, 4<<20)
}

// write returns a request that the device writes the spans.
func write(token uint32, spans ...dma.Span) vring.Request {
	r := vring.Request{Token: token}
	for _, s := range spans {
		r.Bufs = append(r.Bufs, vring.Buffer{Addr: s.Addr(), Len: s.Len})
	}
	return r
}

// count returns how many bytes of the span are 1, from its start on, and fails where one behind them is not 0.
func count(t *testing.T, s dma.Span) int {
	t.Helper()
	b := make([]byte, s.Len)
	s.CopyOut(b, 0)
	n := 0
	for n < len(b) && b[n] == 1 {
		n++
	}
	for i, v := range b[n:] {
		if v != 0 {
			t.Fatalf("byte %d is %d, and %d bytes were filled", n+i, v, n)
		}
	}
	return n
}

// A buffer is filled to its length, and not beyond: one of several parts, one that is longer than what is given at once, one of a byte.
func TestFill(t *testing.T) {
	_, r := rig(t, Config{Rate: MaxRate})
	q := r.Queue(0, 16)
	q.Start(vring.State{})
	long, a, b, one := r.Take(3<<20), r.Take(10), r.Take(7), r.Take(1)
	q.Add(write(1, long), write(2, a, b), write(3, one))
	for i, want := range []vring.Completion{{Token: 1, Len: maxFill}, {Token: 2, Len: 17}, {Token: 3, Len: 1}} {
		if got := q.Wait(1)[0]; got != want {
			t.Errorf("request %d: %+v, want %+v", i, got, want)
		}
	}
	for _, c := range []struct {
		s    dma.Span
		want int
	}{{long, maxFill}, {a, 10}, {b, 7}, {one, 1}} {
		if got := count(t, c.s); got != c.want {
			t.Errorf("%d bytes of %d are filled, want %d", got, c.s.Len, c.want)
		}
	}
}

// What the kernel gives differs each time.
func TestKernel(t *testing.T) {
	_, r := rig(t, Config{Source: getrandom})
	q := r.Queue(0, 4)
	q.Start(vring.State{})
	a, b := r.Take(64), r.Take(64)
	q.Add(write(1, a), write(2, b))
	q.Wait(2)
	var x, y, zero [64]byte
	a.CopyOut(x[:], 0)
	b.CopyOut(y[:], 0)
	if x == zero || x == y {
		t.Errorf("%x, %x", x, y)
	}
}

// The rate holds over time, whatever the driver asks for, and the time it takes to ask for single bytes is limited too.
func TestRate(t *testing.T) {
	now := time.Unix(1000, 0)
	b := bucket{rate: 1000, level: 1000, now: func() time.Time { return now }}
	total, requests := 0, 0
	take := func(n uint32) {
		for b.wait(minCharge) == 0 {
			g := b.grant(n)
			if g < 1 || uint32(g) > n {
				t.Fatalf("%d bytes for a buffer of %d", g, n)
			}
			total += g
			requests++
		}
	}
	take(1 << 30)
	if total < 1000-minCharge || total > 1000 {
		t.Errorf("%d bytes at once at a rate of 1000", total)
	}
	for i := 0; i < 100_000; i++ { // 10 s in small steps: what is left over of each counts
		now = now.Add(100 * time.Microsecond)
		take(1 << 30)
	}
	if total < 10_900 || total > 11_000 {
		t.Errorf("%d bytes after 10 s at a rate of 1000, with 1000 at the start", total)
	}
	now, total, requests = now.Add(time.Hour), 0, 0
	take(1)
	if want := 1000 / minCharge; total != want || requests != want {
		t.Errorf("%d bytes in %d requests of one byte, want %d", total, requests, want)
	}
	if d := b.wait(minCharge); d <= 0 || d > 100*time.Millisecond {
		t.Errorf("the next bytes in %v", d)
	}
	now = now.Add(-time.Hour) // a clock that went back
	if b.wait(minCharge) != 0 {
		t.Error("nothing after the clock went back")
	}
}

// A driver that has got its rate waits; the device stops all the same, with its buffers unpopped, and goes on later.
func TestThrottled(t *testing.T) {
	e, r := rig(t, Config{Rate: MinRate})
	q := r.Queue(0, 16)
	q.Start(vring.State{})
	var reqs []vring.Request
	for i := uint32(0); i < 8; i++ {
		reqs = append(reqs, write(i, r.Take(minCharge)))
	}
	q.Add(reqs...)
	q.Wait(1)
	for begin := time.Now(); e.Status().Counters["throttled"] == 0; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("%+v", e.Status())
		}
	}
	s, err := e.StopQueue(0, time.Now().Add(20*time.Second))
	if err != nil || s.Err != nil {
		t.Fatal(err, s.Err)
	}
	st := e.Status()
	if n := st.Counters["requests"]; s.State.Avail != s.State.Used || uint64(s.State.Used) != n || n >= 8 || st.Counters["bytes"] != n*minCharge {
		t.Errorf("stopped at %+v after %d of 8 requests, counters %v", s.State, n, st.Counters)
	}
	for i := 1; i < int(s.State.Used); i++ {
		q.Wait(1)
	}
	q.Start(s.State)
	if c := q.Wait(1)[0]; c.Token != uint32(s.State.Used) {
		t.Errorf("goes on with request %d, want %d", c.Token, s.State.Used)
	}
}

// A queue that is disabled receives nothing until it is enabled.
func TestDisabled(t *testing.T) {
	e, r := rig(t, Config{})
	q := r.Queue(0, 4)
	q.Start(vring.State{})
	if err := e.EnableQueue(0, false, time.Time{}); err != nil {
		t.Fatal(err)
	}
	q.Add(write(1, r.Take(16)))
	s, err := e.StopQueue(0, time.Time{})
	if err != nil || s.State.Used != 0 || s.State.Avail != 0 {
		t.Fatalf("%+v, %v", s, err)
	}
	q.Start(s.State)
	q.Wait(1)
}

// A driver that breaks the rules loses its queue, is told of, and can start anew.
func TestBadDriver(t *testing.T) {
	e, r := rig(t, Config{})
	q := r.Queue(0, 4)
	q.Start(vring.State{})
	good, bad := r.Take(16), r.Take(16)
	q.Add(write(1, good), vring.Request{Readable: 1, Bufs: []vring.Buffer{{Addr: bad.Addr(), Len: 16}}})
	if err := r.Broken(); !errors.Is(err, errReadable) || device.CauseOf(err) != device.CausePeer {
		t.Errorf("%v", err)
	}
	if c := q.Wait(1)[0]; c.Token != 1 || c.Len != 16 {
		t.Errorf("the buffer before the bad one: %+v", c)
	}
	s, err := e.StopQueue(0, time.Time{})
	if err != nil || !errors.Is(s.Err, errReadable) || s.State.Avail != 1 || s.State.Used != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	if st := e.Status(); st.Counters["broken"] != 1 || !strings.Contains(st.LastError, "rng0") {
		t.Errorf("%+v", st)
	}
	// Behind the memory.
	if err := e.Reset(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if err := e.SetFeatures(plain.Features, device.Options{}); err != nil {
		t.Fatal(err)
	}
	q = r.Queue(0, 4)
	q.Start(vring.State{})
	q.Add(vring.Request{Bufs: []vring.Buffer{{Addr: 1 << 40, Len: 16}}})
	if err := r.Broken(); !errors.Is(err, vring.ErrTranslate) {
		t.Errorf("%v", err)
	}
}

// A source that fails takes the device down, and not the program.
func TestSourceFails(t *testing.T) {
	fail := errors.New("no entropy")
	_, r := rig(t, Config{Source: func([]byte) error { return fail }})
	q := r.Queue(0, 4)
	q.Start(vring.State{})
	q.Add(write(1, r.Take(16)))
	if err := r.Broken(); !errors.Is(err, fail) {
		t.Errorf("%v", err)
	}
}

func TestConfig(t *testing.T) {
	for _, rate := range []uint64{1, MinRate - 1, MaxRate + 1, 1<<64 - 1} {
		if _, err := New(Config{Name: "rng0", Rate: rate}); err == nil || !strings.Contains(err.Error(), "rng0") {
			t.Errorf("rate %d: %v", rate, err)
		}
	}
	e, err := New(Config{Name: "rng0", Deny: virtio.FeaturesOf(virtio.EventIdx)})
	if err != nil {
		t.Fatal(err)
	}
	if f := e.Features(); f != virtio.FeaturesOf(virtio.Version1, virtio.IndirectDesc, virtio.RingPacked) {
		t.Errorf("offers %v", f)
	}
	for _, f := range []virtio.Features{{}, virtio.FeaturesOf(virtio.Version1, virtio.NetMAC), virtio.FeaturesOf(virtio.Version1, virtio.EventIdx)} {
		if err := e.SetFeatures(f, device.Options{}); err == nil {
			t.Errorf("features %v are accepted", f)
		}
	}
	if e.Queue(0).Max == 0 || e.Queue(1).Max != 0 || e.Queues() != 1 || len(e.Config()) != 0 {
		t.Errorf("%+v, %+v", e.Queue(0), e.Queue(1))
	}
	if err := e.SetRunning(true, time.Time{}); err == nil {
		t.Error("runs without a queue")
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}
