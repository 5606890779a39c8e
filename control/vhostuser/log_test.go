package vhostuser

import (
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

const logProto = allProto | protoLog

// pageLog is a front end's log, and the copy of the memory that it makes by it, as a migration does.
type pageLog struct {
	f     *front
	file  int
	size  uint64
	words []uint32
	taken []bool // pages found marked, by their number in the memory
	copy  []byte
}

// logSize is a log for all of a front's memory.
const logSize = (guestBase+frontSize)/dma.LogPage/8 + 8

func newPageLog(f *front, size uint64) *pageLog {
	f.t.Helper()
	l := &pageLog{f: f, file: memfd(f.t, int64(size)), size: size, taken: make([]bool, frontSize/dma.LogPage), copy: make([]byte, frontSize)}
	b, err := unix.Mmap(l.file, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { unix.Munmap(b) })
	l.words = unsafe.Slice((*uint32)(unsafe.Pointer(&b[0])), len(b)/4)
	f.mem.CopyOut(l.copy, 0)
	return l
}

// logBase encodes SET_LOG_BASE.
func logBase(size, offset uint64) []byte { return append(encodeU64(size), encodeU64(offset)...) }

// give sends the log to the back end, whose answer is empty and the only one.
func (l *pageLog) give() {
	l.f.t.Helper()
	send(l.f.t, l.f.fd, encodeMessage(SetLogBase, flagVersion, logBase(l.size, 0)), l.file)
	r, flags, p, err := l.f.recv()
	if err != nil || r != SetLogBase || flags != flagVersion|flagReply || len(p) != 0 {
		l.f.t.Fatalf("SET_LOG_BASE: answer %s with flags %#x and %d bytes, %v", r, flags, len(p), err)
	}
	l.f.getU64(GetFeatures) // another answer would come before this one's
}

// harvest takes what is marked and copies those pages: the bit first.
func (l *pageLog) harvest() (n int) {
	for i := range l.words {
		if atomic.LoadUint32(&l.words[i]) == 0 {
			continue
		}
		v := atomic.SwapUint32(&l.words[i], 0)
		b := (*[4]byte)(unsafe.Pointer(&v))
		for k := 0; k < 32; k++ {
			if b[k/8]>>uint(k%8)&1 == 0 {
				continue
			}
			at := uint64(32*i+k)*dma.LogPage - guestBase
			if at >= frontSize {
				l.f.t.Errorf("page %d is marked, which is none of the memory", 32*i+k)
				continue
			}
			l.f.mem.CopyOut(l.copy[at:at+dma.LogPage], at)
			l.taken[at/dma.LogPage] = true
			n++
		}
	}
	return n
}

// written returns, of the pages that the device side alone writes, those that differ from the copy: of used rings (packed:
// event words), and of the buffers of queue 0.
func (l *pageLog) written() (device, buffers []uint64) {
	b := make([]byte, dma.LogPage)
	for at := uint64(0); at < frontSize; at += dma.LogPage {
		l.f.mem.CopyOut(b, at)
		if string(b) == string(l.copy[at:at+dma.LogPage]) {
			continue
		}
		switch {
		case at < 2*ringRoom && at%ringRoom == 0x3000:
			device = append(device, at)
		case at >= bufBase && at < bufBase+ringSize*bufLen:
			buffers = append(buffers, at)
		}
	}
	return device, buffers
}

// logAddr is addr with the log's address and flag.
func (f *front) logAddr(i int, on bool) []byte {
	b := f.addr(i)
	if on {
		native.PutUint32(b[4:], logRing)
		native.PutUint64(b[32:], guestBase+f.qs[i].c.Device.Off)
	}
	return b
}

// logAll turns the log on or off, as QEMU does while the rings run.
func (f *front) logAll(feat virtio.Features, buffers, ring bool) {
	f.t.Helper()
	v := feat.Mask() | featProtocol
	if buffers {
		v |= featLogAll
	}
	f.set(SetFeatures, encodeU64(v))
	for i := range f.qs {
		f.set(SetVringAddr, f.logAddr(i, ring))
	}
}

// TestLogCopies: the memory is copied by the log while the kernel's answers come in, and the copy is what the memory is at
// the end. Marks that are left out are found.
func TestLogCopies(t *testing.T) {
	for _, k := range kinds {
		k := k
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			n := newNet(t)
			defer n.Close()
			d := newDoor(t, n)
			defer d.stop()
			k.f.Set(virtio.NetMrgRxbuf)
			for _, c := range []struct {
				name          string
				buffers, ring bool
			}{{"all", true, true}, {"the ring alone", false, true}, {"nothing", false, false}} {
				f := runningWith(t, d, k.f, logProto)
				f.arps(20, func(int) {})
				l := newPageLog(f, logSize)
				l.give()
				f.logAll(k.f, c.buffers, c.ring)
				f.mem.CopyOut(l.copy, 0)
				quit, done := make(chan struct{}), make(chan int)
				go func() {
					sum := 0
					for {
						sum += l.harvest()
						select {
						case <-quit:
							done <- sum
							return
						case <-time.After(100 * time.Microsecond):
						}
					}
				}()
				f.arps(100, func(int) {})
				for i := range f.qs {
					f.stop(i)
				}
				close(quit)
				<-done
				l.harvest()
				if got := d.n.load(); got["queues_broken"] != 0 || got["failed"] != 0 {
					t.Errorf("%s: %v", c.name, got)
				}
				device, buffers := l.written()
				if c.buffers != (len(buffers) == 0) || c.ring != (len(device) == 0) {
					t.Errorf("%s: pages of rings %#x and of buffers %#x are not those of the copy", c.name, device, buffers)
				}
				if packed := k.f.Has(virtio.RingPacked); l.taken[0] != (packed && c.ring) || l.taken[0x2000/dma.LogPage] {
					t.Errorf("%s: the descriptors are marked: %v, the driver area: %v", c.name, l.taken[0], l.taken[0x2000/dma.LogPage])
				}
				unix.Shutdown(f.fd, unix.SHUT_RDWR)
				eventually(t, "the memory and the log are unmapped", func() bool { return mapsOf(t, f.file) == 1 && mapsOf(t, l.file) == 1 })
			}
		})
	}
}

// runningWith is running with other protocol features.
func runningWith(t *testing.T, d *door, feat virtio.Features, proto uint64) *front {
	t.Helper()
	f := newFront(t, d.connect(t))
	f.negotiate(feat, proto)
	f.setTable()
	for i := 0; i < 2; i++ {
		f.queue(i, feat)
		f.start(i, firstBase(feat))
		f.enable(i, 1)
	}
	return f
}

// TestLogToggled: the log is turned on and off, replaced and given again while the rings run: nothing is started anew, what
// is written is marked in the log of that time, and nothing in another one. A log that is truncated ends the connection.
func TestLogToggled(t *testing.T) {
	for _, k := range []int{0, 2} {
		k := kinds[k]
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			n := newNet(t)
			defer n.Close()
			d := newDoor(t, n)
			defer d.stop()
			f := runningWith(t, d, k.f, logProto)
			a, b := newPageLog(f, logSize), newPageLog(f, logSize)
			check := func(what string, in, other *pageLog) {
				t.Helper()
				f.mem.CopyOut(a.copy, 0)
				copy(b.copy, a.copy)
				a.harvest()
				b.harvest()
				f.arps(15, func(int) {})
				first, second := 0, 0
				if in != nil {
					// What is in flight is written and not marked yet: the loops rest while the memory is compared.
					f.enable(1, 0)
					f.enable(1, 1)
					f.enable(0, 0)
					first = in.harvest()
					if device, buffers := in.written(); len(device)+len(buffers) != 0 {
						t.Errorf("%s: pages of rings %#x and of buffers %#x are not marked", what, device, buffers)
					}
					f.enable(0, 1)
				}
				if second = other.harvest(); (in != nil) != (first > 0) || second != 0 {
					t.Errorf("%s: %d pages are marked in the log, and %d in the other one", what, first, second)
				}
			}
			check("before", nil, a)
			a.give()
			check("given, and not turned on", nil, a)
			f.logAll(k.f, true, true)
			check("on", a, b)
			a.give()
			f.logAll(k.f, true, true)
			check("given again", a, b)
			a.harvest()
			b.give()
			check("another log", b, a)
			if m := mapsOf(t, a.file); m != 1 {
				t.Errorf("%d mappings of a log that was replaced", m)
			}
			f.logAll(k.f, false, false)
			b.harvest()
			check("off", nil, b)
			c := d.n.load()
			if c["queue_starts"] != 2 || c["queue_stops"] != 0 || c["failed"] != 0 || c["logs"] != 2 || c["log_changes"] != 2 || c["log_outside"] != 0 {
				t.Errorf("%v", c)
			}

			f.logAll(k.f, true, true)
			if err := unix.Ftruncate(b.file, 0); err != nil {
				t.Fatal(err)
			}
			b.words = nil
			if n, err := f.qs[1].drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: guestBase + bufBase, Len: 60}}, Readable: 1}}); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			f.qs[1].drv.NeedKick()
			f.qs[1].kick.Ring()
			eventually(t, "the log is unmapped", func() bool { return mapsOf(t, b.file) == 1 && mapsOf(t, f.file) == 1 })
			if d.n.load()["memory_faults"] == 0 || !d.log.has("dirty log") {
				t.Errorf("%v, %q", d.n.load(), d.log.lines)
			}
			runningWith(t, d, k.f, logProto).arps(5, func(int) {})
		})
	}
}

// TestLogAtStart: a guest that restarts while it is migrated has its queues started before the log comes: they wait for it. What
// is marked in a log that nobody reads any more is marked in the one that replaces it.
func TestLogAtStart(t *testing.T) {
	for _, k := range []int{0, 2} {
		feat := kinds[k].f
		e := newEcho(t, 1)
		d := newDoor(t, e)
		f := newFront(t, d.connect(t))
		f.negotiate(feat, logProto)
		f.set(SetFeatures, encodeU64(feat.Mask()|featProtocol|featLogAll))
		f.setTable()
		for i := 0; i < 2; i++ {
			f.queue(i, feat)
			f.set(SetVringNum, vringState{uint32(i), ringSize}.encode())
			f.set(SetVringBase, vringState{uint32(i), firstBase(feat)}.encode())
			f.set(SetVringAddr, f.logAddr(i, true))
			f.set(SetVringCall, encodeU64(uint64(i)), f.qs[i].call.FD())
			f.set(SetVringKick, encodeU64(uint64(i)), f.qs[i].kick.FD())
			f.enable(i, 1)
		}
		if run, started, _ := e.state(); run || started != 0 {
			t.Fatalf("without a log: running %v, queues %#x", run, started)
		}
		bell, err := doorbell.NewEventfd()
		if err != nil {
			t.Fatal(err)
		}
		defer bell.Close()
		f.set(SetLogFD, nil, bell.FD())
		l := newPageLog(f, logSize)
		l.give()
		if run, started, _ := e.state(); !run || started != 3 {
			t.Fatalf("with the log: running %v, queues %#x", run, started)
		}
		move := func() error { _, err := e.echo(0); return err }
		f.trip(0, 100, 1, move)
		if n, _ := bell.Ack(); n == 0 {
			t.Error("the descriptor of SET_LOG_FD was not rung")
		}
		// The same memory in other pieces: the queues change over, and go on marking.
		f.regs = []region{{guestBase, mib, userBase, 0}, {guestBase + mib, frontSize - mib, userBase + 1<<37, mib}}
		f.setTable()
		f.trip(0, 100, 2, move)
		changes, _ := e.count()

		next := newPageLog(f, logSize+4096)
		next.give()
		next.give()
		if got, _ := e.count(); got != changes+2 {
			t.Errorf("%d changes for a log of two queues, want 2", got-changes)
		}
		want := l.harvest()
		if got := next.harvest(); want == 0 || got != want {
			t.Errorf("%d pages are marked in the log that replaces one with %d", got, want)
		}
		f.mem.CopyOut(next.copy, 0)
		f.trip(0, 100, 3, move)
		next.harvest()
		if device, buffers := next.written(); len(device)+len(buffers) != 0 {
			t.Errorf("pages of rings %#x and of buffers %#x are not marked", device, buffers)
		}
		if n := d.n.load(); n["failed"] != 0 || n["queue_starts"] != 2 || n["logs"] != 2 {
			t.Errorf("%v", n)
		}
	}
}

// TestLogRefused: what cannot be logged is refused, and the connection goes on; a log that cannot be used is an error that ends it, as
// SET_LOG_BASE has no answer that says so.
func TestLogRefused(t *testing.T) {
	feat := kinds[0].f
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := runningWith(t, d, feat, logProto)
	move := func() error { _, err := e.echo(0); return err }
	on := encodeU64(feat.Mask() | featProtocol | featLogAll)
	refused := func(what, why string, r Request, payload []byte, fds ...int) {
		t.Helper()
		if f.ask(r, payload, fds...) {
			t.Errorf("%s: done", what)
		}
		if !d.log.has(why) {
			t.Errorf("%s: the log says nothing of %q: %q", what, why, d.log.lines)
		}
	}
	refused("on without a log", "SET_FEATURES: unusable dirty log: queue 0 runs", SetFeatures, on)
	refused("a ring without a log", "SET_VRING_ADDR: unusable dirty log: queue 1 runs", SetVringAddr, f.logAddr(1, true))
	wrap := f.logAddr(0, true)
	native.PutUint64(wrap[32:], 1<<64-100)
	refused("a ring marked beyond all addresses", "pass the end of the guest's addresses", SetVringAddr, wrap)
	f.trip(0, 10, 1, move)

	// One that was given while nothing is logged may be of any size; turned on it has to do.
	small := newPageLog(f, guestBase/dma.LogPage/8)
	small.give()
	refused("on with a small log", "SET_FEATURES: unusable dirty log: its 0x20000 bytes stand for addresses below 0x100000000", SetFeatures, on)
	l := newPageLog(f, logSize)
	l.give()
	f.set(SetFeatures, on)
	native.PutUint64(wrap[32:], guestBase+16*frontSize)
	refused("a ring marked outside the log", "the device area of queue 0", SetVringAddr, wrap)
	f.set(SetVringAddr, f.logAddr(0, true))
	more, file := region{1 << 40, mib, 1 << 45, 0}, memfd(t, mib)
	refused("memory beyond the log", "ADD_MEM_REG: unusable dirty log", AddMemReg, slot(more), file)
	refused("a table beyond the log", "SET_MEM_TABLE: unusable dirty log", SetMemTable, table([]region{f.regs[0], f.regs[1], more}), f.file, f.file, file)
	if mapsOf(t, file) != 0 || openFDs(t, file) != 1 {
		t.Errorf("%d mappings of memory that was refused, %d descriptors", mapsOf(t, file), openFDs(t, file))
	}
	refused("no descriptor to ring", "SET_LOG_FD: wrong file descriptors", SetLogFD, nil)
	refused("memory to ring", "SET_LOG_FD: wrong file descriptors", SetLogFD, nil, file)
	f.trip(0, 10, 2, move)
	f.logAll(feat, false, false)
	f.set(AddMemReg, slot(more), file)
	f.trip(0, 10, 3, move)
	refused("on with more memory than the log has bits for", "SET_FEATURES: unusable dirty log", SetFeatures, on)
	// Without queues that run the log is forgotten, and they wait for another one.
	for i := 0; i < 2; i++ {
		f.stop(i)
	}
	f.set(SetFeatures, encodeU64(featProtocol))
	f.set(SetFeatures, on)
	for i := 0; i < 2; i++ {
		f.start(i, uint32(f.mem.Load16(uint64(i)*ringRoom+0x3000+2)))
	}
	if _, started, _ := e.state(); started != 0 || mapsOf(t, l.file) != 1 {
		t.Errorf("with a log that is too small queues %#x are started; %d mappings", started, mapsOf(t, l.file))
	}
	large := newPageLog(f, (1<<40+mib)/dma.LogPage/8)
	large.words = large.words[:logSize/4]
	large.give()
	f.trip(0, 10, 4, move)
	if large.harvest() == 0 {
		t.Error("nothing is marked")
	}

	unix.Shutdown(f.fd, unix.SHUT_RDWR)
	f = newFront(t, d.connect(t))
	f.negotiate(feat, allProto)
	refused("the log without its protocol feature", "log_all without protocol feature log_shmfd", SetFeatures, on)
	if f.ask(SetLogBase, logBase(logSize, 0), l.file) {
		t.Error("SET_LOG_BASE without its protocol feature was done")
	}
	unix.Shutdown(f.fd, unix.SHUT_RDWR)

	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	disk, err := os.Open("log_test.go")
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	eventfd, err := doorbell.NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	defer eventfd.Close()
	good := memfd(t, logSize)
	huge := memfd(t, 1<<40)
	for _, c := range []struct {
		name    string
		payload []byte
		fds     []int
		want    string
	}{
		{"no bytes", logBase(0, 0), []int{good}, "at least 8 bytes"},
		{"4 bytes", logBase(4, 0), []int{good}, "at least 8 bytes"},
		{"beyond its file", logBase(logSize+8, 0), []int{good}, "passes the end of its file"},
		{"an offset beyond its file", logBase(logSize, 4096), []int{good}, "passes the end of its file"},
		{"an offset that overflows", logBase(16, 1<<64-8), []int{good}, "passes the end of its file"},
		{"a size that overflows", logBase(1<<64-8, 8), []int{good}, "has at most"},
		{"more than addresses", logBase(1<<39, 0), []int{huge}, "has at most"},
		{"an odd offset", logBase(4096, 4), []int{good}, "multiple of 8"},
		{"a pipe", logBase(logSize, 0), pipe[:1], "no file in memory"},
		{"an eventfd", logBase(logSize, 0), []int{eventfd.FD()}, "no file in memory"},
		{"a file on a disk", logBase(64, 0), []int{int(disk.Fd())}, "no file in memory"},
		{"too small for the memory", logBase(4096, 0), []int{good}, "below 0x8000000, the region at 0x100000000"},
		{"no descriptor", logBase(logSize, 0), nil, "wrong file descriptors: 0"},
		{"two descriptors", logBase(logSize, 0), []int{good, good}, "wrong file descriptors: 2"},
		{"8 bytes of payload", encodeU64(logSize), []int{good}, "wrong length"},
	} {
		be := newBackend("door0", newEcho(t, 1), &testLog{}, new(counters))
		ask := func(r Request, payload []byte, fds ...int) ([]byte, error) {
			m := &message{req: r, flags: flagVersion | flagNeedReply, payload: payload}
			for _, fd := range fds {
				n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
				if err != nil {
					t.Fatal(err)
				}
				m.fds = append(m.fds, n)
			}
			return be.handle(m)
		}
		for _, err := range [...]error{
			second(ask(SetProtocolFeatures, encodeU64(logProto))), second(ask(SetFeatures, on)), second(ask(SetMemTable, table(f.regs[:1]), f.file)),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		reply, err := ask(SetLogBase, c.payload, c.fds...)
		if reply != nil || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, with an answer of %d bytes; want %q", c.name, err, len(reply), c.want)
		}
		if !errors.Is(err, ErrLog) && !errors.Is(err, ErrDescriptors) && !errors.Is(err, ErrLength) {
			t.Errorf("%s: an error of another kind: %v", c.name, err)
		}
		if err := be.close(time.Time{}); err != nil {
			t.Error(err)
		}
	}
	if mapsOf(t, good) != 0 || openFDs(t, good) != 1 || openFDs(t, huge) != 1 {
		t.Errorf("%d mappings and %d descriptors of logs that were refused", mapsOf(t, good), openFDs(t, good))
	}
	f = runningWith(t, d, feat, logProto)
	f.trip(0, 10, 5, move)
}

func second(_ []byte, err error) error { return err }
