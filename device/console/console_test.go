package console

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/internal/plaintest"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// board is the driver of a console, with 16 buffers of 1000 bytes each way.
type board struct {
	*Console
	r        *plaintest.Rig
	rx, tx   *plaintest.Queue
	in, out  [16]dma.Span
	printing uint32 // buffers printed by
}

func newBoard(t testing.TB, scrollback int) *board { return newBoardOf(t, scrollback, 2<<20) }

// newBoardOf is newBoard with so many bytes of memory.
func newBoardOf(t testing.TB, scrollback, memory int) *board {
	t.Helper()
	c, err := New(Config{Name: "con0", Scrollback: scrollback})
	if err != nil {
		t.Fatal(err)
	}
	b := &board{Console: c, r: plaintest.New(t, c, possible, memory)}
	b.rx, b.tx = b.r.Queue(toDriver, 16), b.r.Queue(fromDriver, 16)
	for i := range b.in {
		b.in[i], b.out[i] = b.r.Take(1000), b.r.Take(1000)
	}
	return b
}

func (b *board) start() {
	b.rx.Start(vring.State{})
	b.tx.Start(vring.State{})
}

// print prints p, and waits until the device has it.
func (b *board) print(p []byte) {
	for len(p) > 0 {
		n := len(p)
		if n > 1000 {
			n = 1000
		}
		s := b.out[b.printing%16]
		s.CopyIn(0, p[:n])
		b.tx.Add(vring.Request{Readable: 1, Bufs: []vring.Buffer{{Addr: s.Addr(), Len: uint32(n)}}})
		b.tx.Wait(1)
		b.printing++
		p = p[n:]
	}
}

// offer offers receive buffer i.
func (b *board) offer(i uint32) {
	b.rx.Add(vring.Request{Token: i, Bufs: []vring.Buffer{{Addr: b.in[i].Addr(), Len: 1000}}})
}

// receive returns what comes in the next buffer, and offers it again.
func (b *board) receive() []byte {
	c := b.rx.Wait(1)[0]
	p := make([]byte, c.Len)
	b.in[c.Token].CopyOut(p, 0)
	b.offer(c.Token)
	return p
}

// stream is n bytes in which each place shows.
func stream(n int) []byte {
	p := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], uint64(i)*0x9e3779b97f4a7c15)
	}
	return p
}

// Each way every byte arrives, once and in order: to four terminals that read in time, and to the board. A fifth, which stalls, loses what
// the scrollback does not keep, and is told how much.
func TestStreams(t *testing.T) {
	const size, scrollback = 2 << 20, 64 << 10
	b := newBoard(t, scrollback)
	b.start()
	for i := uint32(0); i < 16; i++ {
		b.offer(i)
	}
	want := stream(size)
	stalled := b.Attach("stalled", -1)
	var wg sync.WaitGroup
	var readers [4]*Terminal
	sums := make(chan [32]byte, len(readers))
	for i := range readers {
		readers[i] = b.Attach(fmt.Sprint("reader", i), -1)
		wg.Add(1)
		go func(r *Terminal) {
			defer wg.Done()
			h, p := sha256.New(), make([]byte, 16<<10)
			for got := 0; got < size; {
				n, lost, err := r.Read(p)
				if err != nil || lost != 0 {
					t.Error(n, lost, err)
					return
				}
				h.Write(p[:n])
				got += n
			}
			sums <- *(*[32]byte)(h.Sum(nil))
		}(readers[i])
	}
	for at := 0; at < size; at += scrollback / 2 {
		b.print(want[at : at+scrollback/2])
		for _, r := range readers { // they read in time
			for begin := time.Now(); ; time.Sleep(100 * time.Microsecond) {
				b.hub.mu.Lock()
				behind := b.hub.printed - r.at
				b.hub.mu.Unlock()
				if behind == 0 {
					break
				}
				if time.Since(begin) > 20*time.Second {
					t.Fatal("a reader does not read")
				}
			}
		}
	}
	wg.Wait()
	for range readers {
		if sum := <-sums; sum != sha256.Sum256(want) {
			t.Error("a reader got something else")
		}
	}
	p := make([]byte, scrollback)
	n, lost, err := stalled.Read(p)
	if err != nil || lost != size-scrollback || n != scrollback || !bytes.Equal(p, want[size-scrollback:]) {
		t.Errorf("the stalled reader: %d bytes, %d lost, %v", n, lost, err)
	}
	if c := b.Status().Counters; c["printed"] != size || c["scrollback_lost"] != size-scrollback {
		t.Errorf("%v", c)
	}

	if err := readers[0].Keyboard(false); err != nil {
		t.Fatal(err)
	}
	wg.Add(1)
	go func() {
		defer wg.Done()
		if n, err := readers[0].Write(want); n != size || err != nil {
			t.Errorf("typed %d, %v", n, err)
		}
	}()
	h := sha256.New()
	for got := 0; got < size; {
		p := b.receive()
		h.Write(p)
		got += len(p)
	}
	wg.Wait()
	if sum := *(*[32]byte)(h.Sum(nil)); sum != sha256.Sum256(want) {
		t.Error("the board got something else")
	}
	if c := b.Status().Counters; c["typed"] != size || c["typed_waiting"] != 0 || c["typed_lost"] != 0 {
		t.Errorf("%v", c)
	}
}

// Queues that are stopped in the middle of a stream go on where they were: no byte is missing, none comes twice.
func TestStop(t *testing.T) {
	const size = 256 << 10
	b := newBoard(t, size)
	b.start()
	want := stream(size)
	typist := b.Attach("typist", 0)
	if err := typist.Keyboard(false); err != nil {
		t.Fatal(err)
	}
	typed := make(chan error, 1)
	go func() {
		_, err := typist.Write(want)
		typed <- err
	}()
	for i := uint32(0); i < 16; i++ {
		b.offer(i)
	}
	var got []byte
	stops := 0
	for at := 0; at < size || len(got) < size; {
		if at < size {
			b.print(want[at : at+1<<10])
			at += 1 << 10
		}
		if len(got) < size {
			got = append(got, b.receive()...)
		}
		if stops++; stops%8 == 0 {
			for _, q := range []struct {
				i int
				q *plaintest.Queue
			}{{toDriver, b.rx}, {fromDriver, b.tx}} {
				s, err := b.StopQueue(q.i, time.Now().Add(20*time.Second))
				if err != nil || s.Err != nil {
					t.Fatal(err, s.Err)
				}
				q.q.Start(s.State)
			}
		}
	}
	if err := <-typed; err != nil {
		t.Error(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the board got something else")
	}
	p := make([]byte, size)
	if n, lost, err := b.Attach("later", -1).Read(p); n != size || lost != 0 || err != nil || !bytes.Equal(p, want) {
		t.Errorf("the terminal got something else: %d, %d, %v", n, lost, err)
	}
}

// The scrollback is there when the board is gone, as much of it as is asked for; what is typed meanwhile reaches the next board, and a terminal
// that waits for room can be closed.
func TestBoardGone(t *testing.T) {
	b := newBoard(t, MinScrollback)
	b.start()
	b.print([]byte("panic: no root\n"))
	if err := b.Reset(time.Time{}); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 100)
	for back, want := range map[int]string{-1: "panic: no root\n", 1000: "panic: no root\n", 5: "root\n"} {
		if n, lost, err := b.Attach("t", back).Read(p); string(p[:n]) != want || lost != 0 || err != nil {
			t.Errorf("%d bytes back: %q, %d, %v", back, p[:n], lost, err)
		}
	}
	typist := b.Attach("typist", 0)
	if err := typist.Keyboard(false); err != nil {
		t.Fatal(err)
	}
	done := make(chan int, 1)
	go func() {
		n, err := typist.Write(make([]byte, maxTyped+1))
		if !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		done <- n
	}()
	for begin := time.Now(); b.Status().Counters["typed_waiting"] < maxTyped; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			t.Fatal("nothing is typed")
		}
	}
	typist.Close()
	if n := <-done; n != maxTyped {
		t.Errorf("%d bytes typed", n)
	}
	if err := b.SetFeatures(possible, device.Options{}); err != nil {
		t.Fatal(err)
	}
	b.rx = b.r.Queue(toDriver, 16)
	b.rx.Start(vring.State{})
	b.offer(3)
	if got := b.receive(); len(got) != 1000 {
		t.Errorf("%d bytes reach the next board", len(got))
	}
}

// One terminal types at a time; another one may take that over, and closing gives it back.
func TestKeyboard(t *testing.T) {
	b := newBoard(t, 0)
	one, two := b.Attach("one", 0), b.Attach("two", 0)
	if _, err := one.Write([]byte("x")); !errors.Is(err, ErrReadOnly) {
		t.Errorf("types without the keyboard: %v", err)
	}
	if err := one.Keyboard(false); err != nil {
		t.Error(err)
	}
	if err := two.Keyboard(false); !errors.Is(err, ErrReadOnly) {
		t.Errorf("takes the keyboard unasked: %v", err)
	}
	if s := b.Status().Interface; s != "*one two" {
		t.Errorf("attached: %q", s)
	}
	if err := two.Keyboard(true); err != nil {
		t.Error(err)
	}
	if _, err := one.Write([]byte("x")); !errors.Is(err, ErrReadOnly) {
		t.Errorf("types still: %v", err)
	}
	two.Close()
	if _, _, err := two.Read(make([]byte, 1)); !errors.Is(err, ErrClosed) {
		t.Errorf("reads when closed: %v", err)
	}
	if err := one.Keyboard(false); err != nil {
		t.Error(err)
	}
	if s := b.Status().Interface; s != "*one" {
		t.Errorf("attached: %q", s)
	}
	if err := b.Console.Close(); err != nil {
		t.Error(err)
	}
	if _, _, err := one.Read(make([]byte, 1)); !errors.Is(err, ErrClosed) {
		t.Errorf("reads from a closed console: %v", err)
	}
}

// The size reaches the driver by the configuration, with one event for each change.
func TestSize(t *testing.T) {
	b := newBoard(t, 0)
	b.SetSize(132, 43)
	b.SetSize(132, 43)
	if e := <-b.r.Events; e.Broken != nil {
		t.Errorf("%v", e)
	}
	if len(b.r.Events) != 0 {
		t.Error("two events for one change")
	}
	if c := b.Config(); !bytes.Equal(c, []byte{132, 0, 43, 0, 1, 0, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("%x", c)
	}
	if err := b.WriteConfig(8, []byte{'x', 0, 0, 0}); !errors.Is(err, device.ErrReadOnly) {
		t.Errorf("an emergency write: %v", err)
	}
	if s := b.Status(); fmt.Sprint(s.Negotiated) != "[size indirect_desc event_idx version_1]" {
		t.Errorf("%v", s.Negotiated)
	}
}

// A queue that is disabled drops what is printed, and counts it, and receives nothing.
func TestDisabled(t *testing.T) {
	b := newBoard(t, 0)
	b.start()
	for i := 0; i < queues; i++ {
		if err := b.EnableQueue(i, false, time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	b.print([]byte("nobody sees it"))
	typist := b.Attach("typist", -1)
	if err := typist.Keyboard(false); err != nil {
		t.Fatal(err)
	}
	if _, err := typist.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	b.offer(0)
	if c := b.Status().Counters; c["printed"] != 0 || c["unseen"] != 14 || c["typed"] != 0 {
		t.Errorf("%v", c)
	}
	if err := b.EnableQueue(toDriver, true, time.Time{}); err != nil {
		t.Fatal(err)
	}
	if p := b.receive(); string(p) != "hello" {
		t.Errorf("%q", p)
	}
}

// A driver that breaks the rules loses the queue, and nothing else.
func TestBadDriver(t *testing.T) {
	for _, c := range []struct {
		queue int
		req   func(b *board) vring.Request
		want  error
	}{
		{fromDriver, func(b *board) vring.Request {
			return vring.Request{Bufs: []vring.Buffer{{Addr: b.in[0].Addr(), Len: 8}}}
		}, errWritable},
		{fromDriver, func(b *board) vring.Request {
			return vring.Request{Readable: 1, Bufs: []vring.Buffer{{Addr: plaintest.Base, Len: maxBuffer + 1}}}
		}, errLong},
		{toDriver, func(b *board) vring.Request {
			return vring.Request{Readable: 1, Bufs: []vring.Buffer{{Addr: b.in[0].Addr(), Len: 8}}}
		}, errReadable},
		{toDriver, func(b *board) vring.Request { return vring.Request{Bufs: []vring.Buffer{{Addr: 1 << 40, Len: 8}}} }, vring.ErrTranslate},
	} {
		b := newBoard(t, 0)
		b.start()
		typist := b.Attach("typist", 0)
		if err := typist.Keyboard(false); err != nil {
			t.Fatal(err)
		}
		if _, err := typist.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		q, other := b.rx, fromDriver
		if c.queue == fromDriver {
			q, other = b.tx, toDriver
		}
		q.Add(c.req(b))
		if err := b.r.Broken(); !errors.Is(err, c.want) {
			t.Errorf("%v, want %v", err, c.want)
		}
		if s, err := b.StopQueue(c.queue, time.Time{}); err != nil || !errors.Is(s.Err, c.want) || s.State.Avail != s.State.Used {
			t.Errorf("%+v, %v", s, err)
		}
		if other == fromDriver {
			b.print([]byte("still there"))
		} else {
			b.offer(1)
			if p := b.receive(); string(p) != "x" {
				t.Errorf("%q", p)
			}
		}
	}
}

func TestConfig(t *testing.T) {
	for _, n := range []int{-1, 1, MinScrollback - 1, MaxScrollback + 1} {
		if _, err := New(Config{Name: "con0", Scrollback: n}); err == nil {
			t.Errorf("a scrollback of %d bytes", n)
		}
	}
	c, err := New(Config{Name: "con0", Deny: virtio.FeaturesOf(virtio.ConsoleSize)})
	if err != nil || c.Features().Has(virtio.ConsoleSize) || c.Queue(2).Max != 0 || c.Queues() != 2 {
		t.Errorf("%v, %v, %+v", err, c.Features(), c.Queue(2))
	}
}

// FuzzQueues: whatever lies in rings and descriptors, the model ends with an error or goes on; it does not panic, and stops.
func FuzzQueues(f *testing.F) {
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0, 0, 1, 0, 0, 0, 0, 0, 16, 0, 0, 0, 2, 0, 1, 0}, 64))
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newBoardOf(t, MinScrollback, 64<<10)
		if len(data) > 4096 {
			data = data[:4096]
		}
		for _, a := range []*plaintest.Queue{b.rx, b.tx} {
			for _, s := range []dma.Span{a.Areas.Desc, a.Areas.Driver} {
				n := len(data)
				if n > int(s.Len) {
					n = int(s.Len)
				}
				s.CopyIn(0, data[:n])
				data = data[n:]
			}
		}
		typist := b.Attach("typist", 0)
		if err := typist.Keyboard(false); err != nil {
			t.Fatal(err)
		}
		if _, err := typist.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		b.start()
		for i := 0; i < queues; i++ { // each has looked once at least
			if s, err := b.StopQueue(i, time.Now().Add(20*time.Second)); err != nil || s.State.Avail != s.State.Used {
				t.Fatalf("%+v, %v", s, err)
			}
		}
		if c := b.Status().Counters; c["typed"]+c["typed_waiting"] != 5 || c["typed_lost"] != 0 {
			t.Fatalf("%v", c)
		}
	})
}
