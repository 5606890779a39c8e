package frames_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/frames"
	"github.com/boardlink/boardlink/mmio"
	"golang.org/x/sys/unix"
)

// never keeps the poll fallback from hiding a lost wake-up.
var never = doorbell.Fallback{Min: time.Minute, Max: time.Minute}

// sendAll sends count frames, and sleeps where there is no room.
func sendAll(s frames.Sender, f *flow, count int) error {
	for f.sent < count {
		out, err := s.Reserve(min(7, count-f.sent))
		if err != nil {
			return err
		}
		if len(out) == 0 {
			if _, err := s.Wait(); err != nil {
				return err
			}
			continue
		}
		for i := range out {
			f.fill(&out[i])
		}
		if err := s.Send(len(out)); err != nil {
			return err
		}
	}
	return nil
}

// Each kind of ring and memory, both directions at once, a goroutine for each end, all of which sleep: frames arrive whole and in order, and
// Stop ends them.
func TestConcurrentEnds(t *testing.T) {
	for _, packed := range []bool{false, true} {
		for _, size := range []int{1, 8, 0} {
			t.Run(fmt.Sprintf("packed=%v size=%d", packed, size), func(t *testing.T) {
				t.Parallel()
				c, err := frames.Connect(frames.Shared{MaxFrame: maxFrame, Packed: packed, Size: size, Fallback: never})
				if err != nil {
					t.Fatal(err)
				}
				defer func() {
					if err := c.Close(); err != nil {
						t.Error(err)
					}
				}()
				const count = 2000
				echoed := make(chan error, 1)
				go func() { echoed <- echo(c.Device, -1) }()
				// Frames are checked by number: the flow of one goroutine is not another one's to look at.
				sent, got := make(chan error, 1), newFlow(9)
				go func() { sent <- sendAll(c.Driver.Sender, newFlow(9), count) }()
				for got.got < count {
					in, err := c.Driver.Receiver.Receive(64)
					if err != nil {
						t.Fatal(err)
					}
					for _, b := range in {
						var o frames.Out
						o.Room = make([]byte, maxFrame)
						got.fill(&o)
						got.check(t, b)
					}
					if len(in) == 0 {
						if _, err := c.Driver.Receiver.Wait(); err != nil {
							t.Fatal(err)
						}
					}
				}
				if err := <-sent; err != nil {
					t.Error(err)
				}
				if err := c.Stop(); err != nil {
					t.Error(err)
				}
				if err := <-echoed; err != nil {
					t.Error(err)
				}
				if n := c.Device.Receiver.Stats().Frames(); n != count || c.Device.Receiver.Stats().Dropped() != 0 {
					t.Errorf("%d frames of %d, %d dropped", n, count, c.Device.Receiver.Stats().Dropped())
				}
			})
		}
	}
}

// echo sends back what comes in, until it is stopped or has sent back count frames.
func echo(p frames.Port, count int) error {
	for n := 0; n != count; {
		in, err := p.Receiver.Receive(64)
		if err != nil {
			return err
		}
		if len(in) == 0 {
			why, err := p.Receiver.Wait()
			if err != nil || why&doorbell.Stopped != 0 {
				return err
			}
			continue
		}
		for len(in) > 0 {
			out, err := p.Sender.Reserve(len(in))
			if err != nil {
				return err
			}
			if len(out) == 0 {
				if _, err := p.Sender.Wait(); err != nil {
					return err
				}
				continue
			}
			for i := range out {
				out[i].Len = copy(out[i].Room, in[i])
			}
			if err := p.Sender.Send(len(out)); err != nil {
				return err
			}
			in = in[len(out):]
			n += len(out)
		}
		if err := p.Receiver.Done(); err != nil {
			return err
		}
	}
	return nil
}

const sharedEnv = "FRAMES_TEST_SHARED"

// echoProcess is the other process of TestTwoProcesses: memory and bells are its descriptors from 3 on.
func echoProcess(how string) error {
	var packed bool
	var size, count int
	if _, err := fmt.Sscan(how, &packed, &size, &count); err != nil {
		return err
	}
	b, err := unix.Mmap(3, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	var bells frames.Bells
	for i := range bells {
		if bells[i], err = doorbell.FromFD(4 + i); err != nil {
			return err
		}
	}
	p, err := frames.Shared{Mem: mmio.FromBytes(b), MaxFrame: maxFrame, Size: 16, Packed: packed, Bells: &bells, Copy: true, Fallback: never}.Device()
	if err != nil {
		return err
	}
	return echo(p, count)
}

// Two processes, over a memfd and eventfds.
func TestTwoProcesses(t *testing.T) {
	for _, packed := range []bool{false, true} {
		t.Run(fmt.Sprintf("packed=%v", packed), func(t *testing.T) {
			t.Parallel()
			const count = 300
			size := int(frames.SharedSize(maxFrame, 16))
			memfd, err := unix.MemfdCreate("frames", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			mem := os.NewFile(uintptr(memfd), "memfd")
			defer mem.Close()
			if err := mem.Truncate(int64(size)); err != nil {
				t.Fatal(err)
			}
			b, err := unix.Mmap(memfd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Munmap(b)
			bells, err := frames.NewBells()
			if err != nil {
				t.Fatal(err)
			}
			defer bells.Close()
			p, err := frames.Shared{Mem: mmio.FromBytes(b), MaxFrame: maxFrame, Size: 16, Packed: packed, Bells: bells, Fallback: never}.Driver()
			if err != nil {
				t.Fatal(err)
			}
			words := append(strings.Fields(os.Getenv("BOARDLINK_TEST_EXEC")), os.Args[0]) // behind the emulator that runs it, where one does
			cmd := exec.Command(words[0], words[1:]...)
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%v %d %d", sharedEnv, packed, size, count))
			cmd.ExtraFiles = []*os.File{mem}
			for _, e := range bells {
				fd, err := unix.FcntlInt(uintptr(e.FD()), unix.F_DUPFD_CLOEXEC, 0)
				if err != nil {
					t.Fatal(err)
				}
				f := os.NewFile(uintptr(fd), "bell")
				defer f.Close()
				cmd.ExtraFiles = append(cmd.ExtraFiles, f)
			}
			var stderr strings.Builder
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if t.Failed() {
					cmd.Process.Kill()
				}
				if err := cmd.Wait(); err != nil {
					t.Errorf("the other process: %v: %s", err, stderr.String())
				}
			}()
			for f := newFlow(3); f.got < count; {
				if f.sent == f.got {
					out, err := p.Sender.Reserve(min(5, count-f.sent))
					if err != nil {
						t.Fatal(err)
					}
					if len(out) == 0 {
						t.Fatal("no room although all frames came back")
					}
					for i := range out {
						f.fill(&out[i])
					}
					if err := p.Sender.Send(len(out)); err != nil {
						t.Fatal(err)
					}
				}
				in, err := p.Receiver.Receive(64)
				if err != nil {
					t.Fatal(err)
				}
				for _, b := range in {
					f.check(t, b)
				}
				if len(in) == 0 {
					if _, err := p.Receiver.Wait(); err != nil {
						t.Fatal(err)
					}
				}
			}
		})
	}
}

// What cannot be is refused with the bound; memory of exactly SharedSize is enough.
func TestSharedConfig(t *testing.T) {
	mem := func(n uint64) mmio.Mem { return mmio.FromBytes(make([]byte, n)) }
	need := frames.SharedSize(maxFrame, 16)
	for _, c := range []struct {
		s    frames.Shared
		want string // "": it can be
	}{
		{frames.Shared{Mem: mem(need), MaxFrame: maxFrame, Size: 16}, ""},
		{frames.Shared{Mem: mem(need), MaxFrame: maxFrame, Size: 16, Packed: true}, ""},
		{frames.Shared{Mem: mem(frames.SharedSize(1, 7)), MaxFrame: 1, Size: 7, Packed: true}, ""},
		{frames.Shared{Mem: mem(need - 8), MaxFrame: maxFrame, Size: 16}, fmt.Sprint(need)},
		{frames.Shared{MaxFrame: maxFrame, Size: -1}, "1 to 32768"},
		{frames.Shared{MaxFrame: maxFrame, Size: 32769}, "1 to 32768"},
		{frames.Shared{MaxFrame: 0}, "1 to 65557"},
		{frames.Shared{MaxFrame: 70000}, "1 to 65557"},
		{frames.Shared{MaxFrame: maxFrame, Batch: 5000}, "1 to 1024"},
	} {
		n, err := frames.Connect(c.s)
		if err == nil {
			if cerr := n.Close(); cerr != nil {
				t.Error(cerr)
			}
		}
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, frames.ErrConfig) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("size %d, frames of %d, memory of %d: %v, want %q", c.s.Size, c.s.MaxFrame, c.s.Mem.Size(), err, c.want)
		}
	}
}
