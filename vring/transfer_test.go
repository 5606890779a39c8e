package vring_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
	"golang.org/x/sys/unix"
)

// A transfer is 8 bytes in 1 to 4 pieces, out of the driver side (even numbers) or into
// it (odd ones). Its bytes are its number, so that a lost, repeated, torn or stale one shows.
const (
	transferBytes = 8
	transferRoom  = 64 // payload of one head, in bytes
)

// cut returns the length of piece i of n.
func cut(i, n int) uint32 {
	switch {
	case n == 1:
		return transferBytes
	case i == n-1:
		return transferBytes - uint32(n-1)
	}
	return 1
}

func stamp(seq uint64) uint64 { return seq*0x9e3779b97f4a7c15 + 1 }

// bell is how one side wakes the other; nil where both poll.
type bell interface {
	ring() error
	wait() error
}

var errLost = errors.New("slept 20 s: a wake-up is lost")

// pushTransfers is the driver side of count transfers, at most window of them under way. With
// bells it sleeps after spins polls in vain.
func pushTransfers(drv vring.Driver, r *vringtest.Rig, count uint64, window, spins int, kick, call bell) error {
	type slot struct {
		seq  uint64
		bufs [4]vring.Buffer
	}
	if window > drv.Size() {
		window = drv.Size()
	}
	slots := make([]slot, window)
	free := make([]uint32, window)
	for i := range free {
		free[i] = uint32(i)
	}
	reqs := make([]vring.Request, 0, 32)
	done := make([]vring.Completion, 32)
	var sent, back uint64
	var word [transferBytes]byte
	idle := 0
	drv.DisarmCall()
	for back < count {
		reqs = reqs[:0]
		for k := 0; k < cap(reqs) && k < len(free) && sent+uint64(k) < count; k++ {
			tok := free[len(free)-1-k]
			s := &slots[tok]
			s.seq = sent + uint64(k)
			n := int(s.seq>>1%4) + 1
			off := uint64(tok) * transferRoom
			v := stamp(s.seq)
			for i := range word {
				word[i] = byte(v >> (8 * i))
			}
			q := vring.Request{Token: tok}
			at := 0
			for i := 0; i < n; i++ {
				l := cut(i, n)
				s.bufs[i] = vring.Buffer{Addr: r.Addr(off), Len: l}
				if s.seq&1 == 0 {
					r.Poke(off, word[at:at+int(l)])
				}
				at += int(l)
				off += 16 // the pieces are apart
			}
			q.Bufs = s.bufs[:n]
			if s.seq&1 == 0 {
				q.Readable = n
			}
			reqs = append(reqs, q)
		}
		n, err := drv.Add(reqs)
		if err != nil {
			return err
		}
		free = free[:len(free)-n]
		sent += uint64(n)
		if kick != nil && drv.NeedKick() {
			if err := kick.ring(); err != nil {
				return err
			}
		}
		m, err := drv.Reap(done)
		if err != nil {
			return err
		}
		for _, c := range done[:m] {
			s := &slots[c.Token]
			if s.seq&1 == 1 {
				n := int(s.seq>>1%4) + 1
				if c.Len != transferBytes {
					return fmt.Errorf("transfer %d came back with %d bytes", s.seq, c.Len)
				}
				at, v := 0, stamp(s.seq)
				for i := 0; i < n; i++ {
					b := word[:cut(i, n)]
					r.Mem.CopyOut(b, r.Payload+uint64(c.Token)*transferRoom+uint64(i)*16)
					for _, x := range b {
						if x != byte(v>>(8*at)) {
							return fmt.Errorf("transfer %d, byte %d: %#x of %#x", s.seq, at, x, v)
						}
						at++
					}
				}
			} else if c.Len != 0 {
				return fmt.Errorf("transfer %d out came back with %d bytes", s.seq, c.Len)
			}
			free = append(free, c.Token)
		}
		back += uint64(m)
		if n > 0 || m > 0 {
			idle = 0
			continue
		}
		if idle++; idle%64 == 0 {
			relax()
		}
		if call == nil || idle < spins {
			continue
		}
		pending, err := drv.ArmCall()
		if err != nil {
			return err
		}
		if !pending {
			if err := call.wait(); err != nil {
				return fmt.Errorf("driver side with %d of %d back: %w", back, sent, err)
			}
		}
		drv.DisarmCall()
		idle = 0
	}
	return nil
}

// pullTransfers is the device side of count transfers.
func pullTransfers(dev vring.Device, count uint64, spins int, inOrder bool, kick, call bell) error {
	var b vring.Batch
	var used []vring.Used
	var word [transferBytes]byte
	idle := 0
	dev.DisarmKick()
	for seq := uint64(0); seq < count; {
		b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
		n, err := dev.Pop(&b, 32)
		if err != nil {
			return err
		}
		used = used[:0]
		for i := range b.Chains {
			c := &b.Chains[i]
			n := int(seq>>1%4) + 1
			spans := b.Spans[c.First : int(c.First)+n]
			v := stamp(seq)
			at := 0
			if seq&1 == 0 {
				if int(c.Readable) != n || c.Writable != 0 || c.ReadLen != transferBytes {
					return fmt.Errorf("transfer %d: %+v", seq, *c)
				}
				for _, s := range spans {
					s.CopyOut(word[:s.Len], 0)
					for _, x := range word[:s.Len] {
						if x != byte(v>>(8*at)) {
							return fmt.Errorf("transfer %d, byte %d: %#x of %#x", seq, at, x, v)
						}
						at++
					}
				}
			} else {
				if int(c.Writable) != n || c.Readable != 0 || c.WriteLen != transferBytes {
					return fmt.Errorf("transfer %d: %+v", seq, *c)
				}
				for _, s := range spans {
					for k := range word[:s.Len] {
						word[k] = byte(v >> (8 * at))
						at++
					}
					s.CopyIn(0, word[:s.Len])
				}
			}
			used = append(used, vring.Used{ID: c.ID, Count: c.Count, Len: c.WriteLen})
			seq++
		}
		// Hand half of them back in another order: transfers are told apart by token.
		for i := 0; i+1 < len(used)/2 && !inOrder; i += 2 {
			used[i], used[i+1] = used[i+1], used[i]
		}
		if err := dev.Complete(used); err != nil {
			return err
		}
		if call != nil && dev.NeedCall() {
			if err := call.ring(); err != nil {
				return err
			}
		}
		if n > 0 {
			idle = 0
			continue
		}
		if idle++; idle%64 == 0 {
			relax()
		}
		if kick == nil || idle < spins {
			continue
		}
		pending, err := dev.ArmKick()
		if err != nil {
			return err
		}
		if !pending {
			if err := kick.wait(); err != nil {
				return fmt.Errorf("device side at transfer %d: %w", seq, err)
			}
		}
		dev.DisarmKick()
		idle = 0
	}
	return nil
}

// relax gives the processor away: a test must not starve its other half.
func relax() {
	runtime.Gosched()
	_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
}

// channel is a bell inside a process.
type channel chan struct{}

func (c channel) ring() error {
	select {
	case c <- struct{}{}:
	default:
	}
	return nil
}

func (c channel) wait() error {
	select {
	case <-c:
		return nil
	case <-time.After(20 * time.Second):
		return errLost
	}
}

// TestConcurrent runs both sides in two goroutines. On the heap the race detector watches.
func TestConcurrent(t *testing.T) {
	eachRing(t, func(t *testing.T, p vringtest.Params) {
		if vring.RaceEnabled && p.Memory.Name != vringtest.Heap.Name {
			return // the race detector does not watch it
		}
		for _, tt := range []struct {
			sleep         bool
			window, spins int
			count         uint64
		}{{false, 64, 0, 10000}, {true, 64, 100, 5000}, {true, 2, 1, 3000}} {
			sleep, count := tt.sleep, tt.count
			r := vringtest.NewRig(t, p, 64, 64*transferRoom)
			drv, dev := r.Pair(t)
			var kick, call bell
			if sleep {
				kick, call = make(channel, 1), make(channel, 1)
			}
			failed := make(chan error, 1)
			go func() { failed <- pullTransfers(dev, count, tt.spins, p.InOrder, kick, call) }()
			err := pushTransfers(drv, r, count, tt.window, tt.spins, kick, call)
			if err == nil {
				err = <-failed
			} else {
				select {
				case e := <-failed:
					err = fmt.Errorf("%v; device side: %v", err, e)
				case <-time.After(time.Second):
				}
			}
			if err != nil {
				t.Fatalf("sleep %v: %v\ndriver %+v\ndevice %+v", sleep, err, drv.Stats().Load(), dev.Stats().Load())
			}
			d, v := drv.Stats().Load(), dev.Stats().Load()
			if d.Chains != count || d.Done != count || v.Chains != count || v.Done != count || d.Bytes != v.Bytes || d.DoneBytes != v.DoneBytes {
				t.Errorf("driver %+v\ndevice %+v", d, v)
			}
		}
	})
}

// eventfd is a bell between processes.
type eventfd int

func (e eventfd) ring() error {
	var b [8]byte
	*(*uint64)(unsafe.Pointer(&b[0])) = 1
	_, err := unix.Write(int(e), b[:])
	return err
}

func (e eventfd) wait() error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		fds := []unix.PollFd{{Fd: int32(e), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 1000)
		if n > 0 {
			var b [8]byte
			_, err = unix.Read(int(e), b[:])
			return err
		}
		if err != nil && err != unix.EINTR {
			return err
		}
		if time.Now().After(deadline) {
			return errLost
		}
	}
}

// The child of TestTwoProcesses is this test binary with -vring.child.
var (
	childRun   = flag.Bool("vring.child", false, "run the device side of TestTwoProcesses")
	childCount = flag.Uint64("vring.count", 0, "its transfers")
	childEvent = flag.Bool("vring.event", false, "with the event index")
	childInd   = flag.Bool("vring.indirect", false, "with indirect descriptors")
	childSleep = flag.Bool("vring.sleep", false, "sleeping on eventfds")
	childSpins = flag.Int("vring.spins", 0, "after so many polls in vain")
	childRing  = flag.String("vring.ring", "split", "the kind of ring")
	childOrder = flag.Bool("vring.inorder", false, "completing in order")
	childKind  = flag.Int("vring.kind", 0, "the mmio.Kind of its mapping")
)

const (
	shareSize = 256
	shareFD   = 3 // memory, kick, call
)

// sharedRig maps a file and makes a rig over it.
func sharedRig(tb testing.TB, fd int, p vringtest.Params, kind mmio.Kind) *vringtest.Rig {
	p.Memory = vringtest.Memory{Name: "shared", New: func(tb testing.TB, n int) mmio.Mem {
		b, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			tb.Fatal(err)
		}
		return mmio.NewMem(unsafe.Pointer(&b[0]), uint64(n), kind)
	}}
	return vringtest.NewRig(tb, p, shareSize, shareSize*transferRoom)
}

func TestMain(m *testing.M) {
	flag.Parse()
	if *childRun {
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, "device side:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child() error {
	// Not where the parent has it: whatever the two share must not be an address.
	for i := 0; i < 3; i++ {
		if _, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
			return err
		}
	}
	p := vringtest.Params{Ring: vringtest.Split, EventIdx: *childEvent, Indirect: *childInd, InOrder: *childOrder}
	if *childRing == vringtest.Packed.Name {
		p.Ring = vringtest.Packed
	}
	r := sharedRig(fatal{}, shareFD, p, mmio.Kind(*childKind))
	dev, err := r.Ring.NewDevice(r.DevCfg)
	if err != nil {
		return err
	}
	var kick, call bell
	if *childSleep {
		kick, call = eventfd(shareFD+1), eventfd(shareFD+2)
	}
	return pullTransfers(dev, *childCount, *childSpins, *childOrder, kick, call)
}

// fatal stands in for a test in the child.
type fatal struct{ testing.TB }

func (fatal) Helper()           {}
func (fatal) Cleanup(func())    {}
func (fatal) Fatal(args ...any) { panic(fmt.Sprint(args...)) }
func (fatal) Fatalf(format string, args ...any) {
	panic(fmt.Sprintf(format, args...))
}

// self returns a command that runs this test binary again: behind the emulator that runs it, where one
// does (internal/runtests says so).
func self(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	words := append(strings.Fields(os.Getenv("BOARDLINK_TEST_EXEC")), exe)
	return exec.Command(words[0], append(words[1:], args...)...)
}

// TestTwoProcesses: ten million transfers between two processes with mappings of their own
// of one file, in 1 to 4 pieces, in and out in turns, over both kinds of ring and all combinations of event index
// and indirect descriptors, some in order, polling or sleeping on eventfds.
func TestTwoProcesses(t *testing.T) {
	total := uint64(10_000_000)
	if testing.Short() {
		total = 200_000
	}
	if vring.RaceEnabled {
		total = 40_000 // the race detector does not watch this memory
	}
	type combo struct {
		ring                     string
		event, ind, order, sleep bool
		kind                     mmio.Kind
		window, spins            int
	}
	var combos, few []combo
	for _, r := range rings {
		for i := 0; i < 8; i++ {
			combos = append(combos, combo{r.Name, i&1 != 0, i&2 != 0, i == 3 || i == 5, i&4 != 0, mmio.Cached, shareSize, 200})
		}
		// The device side as it would see a BAR: aligned words, strong barriers.
		combos = append(combos, combo{r.Name, true, false, false, true, mmio.Uncached, shareSize, 200}, combo{r.Name, false, true, true, true, mmio.WriteCombining, shareSize, 200})
		// Few at a time, and asleep whenever there is nothing to do.
		few = append(few, combo{r.Name, false, false, false, true, mmio.Cached, 1, 1}, combo{r.Name, true, false, true, true, mmio.Cached, 3, 1},
			combo{r.Name, false, true, false, true, mmio.Cached, 3, 1}, combo{r.Name, true, true, false, true, mmio.Cached, 1, 1})
	}
	full := len(combos)
	combos = append(combos, few...)
	for i, c := range combos {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			count := total / uint64(full)
			if i >= full {
				count /= 50
			}
			ring := vringtest.Split
			if c.ring == vringtest.Packed.Name {
				ring = vringtest.Packed
			}
			fd, err := unix.MemfdCreate("vring", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			mem := os.NewFile(uintptr(fd), "memory")
			defer mem.Close()
			if err := mem.Truncate(1 << 20); err != nil {
				t.Fatal(err)
			}
			files := []*os.File{mem}
			for i := 0; i < 2; i++ {
				e, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
				if err != nil {
					t.Fatal(err)
				}
				f := os.NewFile(uintptr(e), "eventfd")
				defer f.Close()
				files = append(files, f)
			}
			r := sharedRig(t, fd, vringtest.Params{Ring: ring, EventIdx: c.event, Indirect: c.ind, InOrder: c.order}, mmio.Cached)
			drv, err := r.Ring.NewDriver(r.DrvCfg)
			if err != nil {
				t.Fatal(err)
			}
			cmd := self(t, "-vring.child", fmt.Sprintf("-vring.count=%d", count), fmt.Sprintf("-vring.event=%v", c.event),
				fmt.Sprintf("-vring.indirect=%v", c.ind), fmt.Sprintf("-vring.sleep=%v", c.sleep), fmt.Sprintf("-vring.kind=%d", c.kind), fmt.Sprintf("-vring.spins=%d", c.spins),
				"-vring.ring="+c.ring, fmt.Sprintf("-vring.inorder=%v", c.order))
			cmd.ExtraFiles = files
			cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0") // else a second for each child
			cmd.Stderr = os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			exited := make(chan error, 1)
			go func() { exited <- cmd.Wait() }()
			var kick, call bell
			if c.sleep {
				kick, call = eventfd(files[1].Fd()), eventfd(files[2].Fd())
			}
			pushed := make(chan error, 1)
			start := time.Now()
			go func() { pushed <- pushTransfers(drv, r, count, c.window, c.spins, kick, call) }()
			for left := 2; left > 0; left-- {
				select {
				case err = <-pushed:
				case err = <-exited:
				case <-time.After(2 * time.Minute):
					err = errors.New("no end after two minutes")
				}
				if err != nil {
					if kerr := cmd.Process.Kill(); kerr != nil && !errors.Is(kerr, os.ErrProcessDone) {
						t.Error(kerr)
					}
					t.Fatalf("%v; driver side %+v", err, drv.Stats().Load())
				}
			}
			s := drv.Stats().Load()
			t.Logf("%d transfers, %.0f ns each; %d batches, %d kicks, %d sleeps", count, float64(time.Since(start).Nanoseconds())/float64(count), s.Published, s.Notify, s.Arms-s.ArmPending)
			if s.Done != count {
				t.Errorf("%d transfers came back", s.Done)
			}
		})
	}
}
