//go:build linux

package netbench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"golang.org/x/sys/unix"
)

// stickRole is what a process does that this program starts as a measuring stick (benchkit.Peer).
const stickRole = "netbench-stick"

// Descriptors of a stick: it is asked on the first; pairs to be joined follow.
const (
	controlFD = benchkit.FirstFD
	pairFD    = benchkit.FirstFD + 1
)

func init() {
	benchkit.Register(stickRole, func(order []byte) (any, error) {
		var n int
		if err := json.Unmarshal(order, &n); err != nil {
			return nil, err
		}
		c := os.NewFile(controlFD, "control")
		return nil, join(n, c, c)
	})
}

// maxFrame is the room for a frame: 64 KiB of IP, Ethernet header, VLAN tag, virtio-net header.
const maxFrame = 1<<16 + 128

// flow counts one direction of a stick: from the first descriptor of each pair to the second, or back. Its loop alone writes.
type flow struct {
	Frames, Bytes, Dropped, Syscalls atomic.Uint64
	_                                [32]byte // a cache line of its own
}

// FlowCounts are the counts of one direction.
type FlowCounts struct {
	Frames   uint64 `json:"frames"`
	Bytes    uint64 `json:"bytes"`
	Dropped  uint64 `json:"dropped"` // frames that the interface refused
	Syscalls uint64 `json:"syscalls"`
}

// join is the program of a measuring stick: it joins n pairs of descriptors, a goroutine for each direction of each pair,
// one read and one write a frame. To each byte on in it answers with its counts on out; it returns at the end of in.
func join(n int, in io.Reader, out io.Writer) error {
	flows := make([]flow, 2*n)
	failed := make(chan error, 2*n)
	for i := range n {
		a, b := pairFD+2*i, pairFD+2*i+1
		go func() { failed <- carry(a, b, &flows[2*i]) }()
		go func() { failed <- carry(b, a, &flows[2*i+1]) }()
	}
	ended := make(chan error, 1)
	go func() { ended <- answer(in, out, flows) }()
	select {
	case err := <-failed:
		return err
	case err := <-ended:
		return err
	}
}

// answer sums the flows of each direction up whenever it is asked.
func answer(in io.Reader, out io.Writer, flows []flow) error {
	var b [1]byte
	for {
		if _, err := in.Read(b[:]); err != nil {
			return nil
		}
		var c [2]FlowCounts
		for i := range flows {
			f := &flows[i]
			c[i%2].Frames += f.Frames.Load()
			c[i%2].Bytes += f.Bytes.Load()
			c[i%2].Dropped += f.Dropped.Load()
			c[i%2].Syscalls += f.Syscalls.Load()
		}
		if err := json.NewEncoder(out).Encode(c); err != nil {
			return err
		}
	}
}

// carry moves frames from one descriptor to another until the first ends.
func carry(from, to int, f *flow) error {
	buf := make([]byte, maxFrame)
	for {
		n, err := unix.Read(from, buf)
		if err != nil {
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EIO) {
				continue
			}
			return fmt.Errorf("read a frame: %w", err)
		}
		if n == 0 {
			return io.EOF // the other process is gone
		}
		_, err = unix.Write(to, buf[:n])
		f.Frames.Store(f.Frames.Load() + 1)
		f.Bytes.Store(f.Bytes.Load() + uint64(n))
		f.Syscalls.Store(f.Syscalls.Load() + 2)
		switch {
		case err == nil:
		case errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EBADF):
			return fmt.Errorf("write a frame: %w", err)
		default: // the interface is down, or does not like the frame
			f.Dropped.Store(f.Dropped.Load() + 1)
		}
	}
}

// stick is a measuring stick that runs.
type stick struct {
	*benchkit.Process
	ctl *os.File
	out *bufio.Reader
}

// startStick starts one between the descriptors of pairs.
func startStick(command []string, pairs [][2]*os.File) (*stick, error) {
	fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	theirs := os.NewFile(uintptr(fd[1]), "control")
	defer theirs.Close()
	s := &stick{ctl: os.NewFile(uintptr(fd[0]), "control")}
	s.out = bufio.NewReader(s.ctl)
	files := []*os.File{theirs}
	for _, p := range pairs {
		files = append(files, p[0], p[1])
	}
	// Not the caller's context: a stick lives as long as its path.
	if s.Process, err = benchkit.Start(context.Background(), stickRole, len(pairs), files, command); err != nil {
		s.ctl.Close()
		return nil, err
	}
	return s, nil
}

// counts asks for the counts of both directions.
func (s *stick) counts() (c [2]FlowCounts, err error) {
	var line []byte
	if _, err = s.ctl.Write([]byte{'?'}); err == nil {
		if line, err = s.out.ReadBytes('\n'); err == nil {
			err = json.Unmarshal(line, &c)
		}
	}
	if err == nil {
		return c, nil
	}
	select {
	case <-s.Gone():
		err = s.Wait(nil)
	case <-time.After(time.Second):
	}
	return c, fmt.Errorf("a measuring stick does not answer: %w", err)
}

// close ends the process and waits until it is gone.
func (s *stick) close() {
	s.ctl.Close()
	s.Stop()
}
