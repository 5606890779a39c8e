//go:build linux

package netbench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
	"golang.org/x/sys/unix"
)

// Names of the paths that are no boardlink.
const (
	Veth         = "veth"          // the kernel alone
	OneProcess   = "one process"   // one process copies between two taps
	TwoProcesses = "two processes" // a process at each tap, a unix SEQPACKET socket between them
)

// Settings of the network namespace of the thread that reads or writes them (ip-sysctl).
const (
	congestionControl   = "/proc/sys/net/ipv4/tcp_congestion_control"
	availableCongestion = "/proc/sys/net/ipv4/tcp_available_congestion_control"
)

// Counts are what the processes of a path did since they started.
type Counts struct {
	Frames   uint64 // that crossed, both ways
	Bytes    uint64 // of them, virtio-net headers apart or not: less than 1 % either way where it matters
	Syscalls uint64 // that move frames, wait for them or tell of them; the runtime's own are not among them
	Rings    uint64 // doorbells
	Dropped  uint64 // frames that an interface refused
	BoardTap uint64 // of the system calls, reads and writes at the board's interface; counted for boardlink
	HostTap  uint64 // and at the host's
}

func (c Counts) sub(d Counts) Counts {
	return Counts{c.Frames - d.Frames, c.Bytes - d.Bytes, c.Syscalls - d.Syscalls, c.Rings - d.Rings, c.Dropped - d.Dropped, c.BoardTap - d.BoardTap, c.HostTap - d.HostTap}
}

// path joins two namespaces, and runs.
type path interface {
	// pair returns the two ends.
	pair() traffic.Pair
	// pids returns the processes that carry frames.
	pids() []int
	// counts asks these processes.
	counts(context.Context) (Counts, error)
	close() error
}

// startPath starts the path of a name.
func startPath(ctx context.Context, c *Config, name string, mtu int) (path, error) {
	var p path
	var err error
	switch name {
	case Veth, OneProcess, TwoProcesses:
		p, err = startJoined(c, name, mtu)
	default:
		p, err = startBoardlink(ctx, c, name, mtu)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	e := p.pair()
	// What the kernel refuses is told before anything is measured.
	err = e.Host.NS.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return traffic.SetCongestion(fd, c.Congestion)
	})
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	for _, d := range [][2]traffic.Endpoint{{e.Host, e.Board}, {e.Board, e.Host}} {
		if err := traffic.WaitReachable(ctx, d[0].NS, d[1].Addr); err != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", name, err), p.close())
		}
	}
	return p, nil
}

// joined is a path of our own.
type joined struct {
	ns     [2]*netns.NS
	sticks []*stick
	relay  bool // frames pass two sticks
}

func startJoined(c *Config, name string, mtu int) (_ path, err error) {
	p := &joined{relay: name == TwoProcesses}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	for i := range p.ns {
		if p.ns[i], err = netns.New(); err != nil {
			return nil, err
		}
	}
	if name == Veth {
		if err := joinVeth(p.ns); err != nil {
			return nil, err
		}
	}
	var taps [2][]*os.File
	defer func() { closeFiles(append(taps[0], taps[1]...)) }() // the sticks have their own
	for i := range p.ns {
		if name != Veth {
			if taps[i], err = openTaps(p.ns[i], c); err != nil {
				return nil, err
			}
		}
		if err := configure(p.ns[i], i, mtu); err != nil {
			return nil, err
		}
	}
	switch name {
	case OneProcess:
		return p, p.start(c, taps[0], taps[1])
	case TwoProcesses:
		var socks [2][]*os.File
		defer func() { closeFiles(append(socks[0], socks[1]...)) }()
		for range taps[0] {
			fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("make a socket: %w", err)
			}
			for i := range fd {
				socks[i] = append(socks[i], os.NewFile(uintptr(fd[i]), "socket"))
				// The first needs CAP_NET_ADMIN in the first user namespace, the second gives at most net.core.wmem_max.
				if unix.SetsockoptInt(fd[i], unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, c.SocketBuffer) != nil {
					unix.SetsockoptInt(fd[i], unix.SOL_SOCKET, unix.SO_SNDBUF, c.SocketBuffer)
				}
			}
		}
		for i := range taps {
			if err := p.start(c, taps[i], socks[i]); err != nil {
				return nil, err
			}
		}
	}
	return p, nil
}

// start starts a stick: the descriptors are all that it has of the namespaces.
func (p *joined) start(c *Config, a, b []*os.File) error {
	var pairs [][2]*os.File
	for i := range a {
		pairs = append(pairs, [2]*os.File{a[i], b[i]})
	}
	s, err := startStick(c.Command, pairs)
	if err != nil {
		return err
	}
	p.sticks = append(p.sticks, s)
	return nil
}

func (p *joined) pair() traffic.Pair {
	return traffic.Pair{Host: traffic.Endpoint{NS: p.ns[0], Addr: addrs[0]}, Board: traffic.Endpoint{NS: p.ns[1], Addr: addrs[1]}}
}

func (p *joined) pids() []int {
	var l []int
	for _, s := range p.sticks {
		l = append(l, s.PID())
	}
	return l
}

func (p *joined) counts(context.Context) (t Counts, err error) {
	for _, s := range p.sticks {
		c, err := s.counts()
		if err != nil {
			return t, err
		}
		for i := range c {
			t.Syscalls += c[i].Syscalls
			t.Dropped += c[i].Dropped
			if !p.relay || i == 0 { // what came from the other stick was counted there
				t.Frames += c[i].Frames
				t.Bytes += c[i].Bytes
			}
		}
	}
	return t, nil
}

func (p *joined) close() error {
	for _, s := range p.sticks {
		s.close()
	}
	for _, n := range p.ns {
		if n != nil {
			n.Close()
		}
	}
	return nil
}

// linked is boardlink's.
type linked struct{ *trial.Rig }

func startBoardlink(ctx context.Context, c *Config, name string, mtu int) (path, error) {
	for _, v := range c.Boardlink {
		if v.Name != name {
			continue
		}
		tc := v.Trial
		tc.MTU, tc.Link, tc.Offload = mtu, c.Link, c.Offload
		r, err := trial.Start(tc)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		if err := r.WaitUp(ctx); err != nil {
			return nil, errors.Join(err, r.Close())
		}
		return linked{r}, nil
	}
	return nil, errors.New("there is no such path")
}

func (p linked) pair() traffic.Pair { return p.Pairs(0)[0] }
func (p linked) pids() []int        { return p.PIDs() }
func (p linked) close() error       { return p.Close() }

func (p linked) counts(ctx context.Context) (t Counts, err error) {
	for _, s := range []board.Side{board.Host, board.Agent} {
		st, err := p.Status(ctx, s)
		if err != nil {
			return t, fmt.Errorf("an end is gone: %w", err)
		}
		for _, l := range st.Links {
			for _, d := range l.Devices {
				for _, q := range d.Queues {
					if s == board.Host { // both count each frame
						t.Frames += q.Pump["frames"]
						t.Bytes += q.Pump["bytes"]
						t.HostTap += q.Pump["syscalls"]
					} else {
						t.BoardTap += q.Pump["syscalls"]
					}
					t.Dropped += q.Pump["dropped"]
					t.Rings += q.Pump["rings"]
					// Reads and writes at the tap, one to ring; one to sleep, and one to take the bell back; two to look on instead
					// (sched_yield and ppoll; the first alone, where it was enough, is not counted).
					t.Syscalls += q.Pump["syscalls"] + q.Pump["rings"] + q.Pump["sleeps"] + 2*q.Pump["looks"] + q.Doorbell["wakeups"]
				}
			}
		}
	}
	return t, nil
}
