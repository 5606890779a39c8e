//go:build linux

// Package trial runs both ends of a link as processes of their own, each in a network namespace of its
// own, over a loopback board, and tries the link with real traffic. `boardlink loopback`
// and the end-to-end tests stand on it.
//
// In the room: processes, namespaces, what is measured around the traffic. Never in it: how ends
// work, how traffic is made (package traffic), printing.
package trial

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
	"golang.org/x/sys/unix"
)

// Config says what to try. The zero value of a field stands for its default.
type Config struct {
	Exe string // the boardlink program
	// Command is how each end (board.Host, board.Agent) is started, before its flags: an emulator and a program for
	// another machine. Default: Exe and "host" or "agent".
	Command [2][]string
	Env     []string // added to the environment of both ends
	// Door is how the ends are joined: "" by a loopback board, "vhost-user" by a socket of that protocol, with the
	// agent as front end: one device of type tap.
	Door    string
	Link    string // "tap" (default) or "tun"
	Offload bool
	MTU     int    // bytes; default 1500
	Window  int64  // shared memory, bytes; default 16 MiB
	Vectors int    // doorbells of each end; default 8, or one for each queue
	Memory  string // how memory across the bus is to be seen: "cached" (default), "write-combining", "uncached"
	// Placement is "auto" (default), "window" or "push".
	Placement string
	// Ring is "auto" (default), "split" or "packed".
	Ring string
	// Queues is how many queue pairs a device has at both ends; default 1 at the host, and the agent follows.
	Queues  int
	Persist bool // interfaces outlive the processes
	Nets    int  // devices; default 1. Addresses are given to all
	Disk    bool // a disk beside the networks: an image in memory, exported by the agent
	Rng     bool // a source of entropy
	Console bool // a console, a pseudo-terminal on the board
	// HostArgs and AgentArgs are added to the command lines.
	HostArgs, AgentArgs []string
	Log                 io.Writer // of both processes; nil keeps it for errors
}

// interfaces' names and addresses; the third number is the device's.
const (
	hostIP4, boardIP4 = "10.66.%d.1", "10.66.%d.2"
	hostIP6, boardIP6 = "fd66:0:0:%d::1", "fd66:0:0:%d::2"
)

func (c Config) withDefaults() Config {
	if c.Link == "" {
		c.Link = "tap"
	}
	if c.MTU == 0 {
		c.MTU = 1500
	}
	if c.Window == 0 {
		c.Window = 16 << 20
	}
	if c.Nets == 0 {
		c.Nets = 1
	}
	if c.Vectors == 0 {
		c.Vectors = max(8, 1+c.Nets*(2*c.Queues+1))
	}
	for _, s := range []board.Side{board.Host, board.Agent} {
		if c.Command[s] == nil {
			c.Command[s] = []string{c.Exe, s.String()}
		}
	}
	if c.Memory == "" {
		c.Memory = "cached"
	}
	if c.Placement == "" {
		c.Placement = "auto"
	}
	if c.Ring == "" {
		c.Ring = "auto"
	}
	return c
}

// Rig is a link that runs. Its methods may be used by several goroutines.
type Rig struct {
	cfg    Config
	place  *place
	server *loopback.Server
	served chan error
	ns     [2]*netns.NS

	mu   sync.Mutex
	proc [2]*process
}

type process struct {
	cmd  *exec.Cmd
	log  *tail
	done chan struct{} // closed when it has ended
	err  error
}

// tail keeps the end of a log, and passes it on.
type tail struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	pass io.Writer
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.buf.Len() > 1<<20 {
		t.buf.Next(t.buf.Len() - 1<<19)
	}
	t.buf.Write(p)
	if t.pass != nil {
		t.pass.Write(p)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}

// Start serves a loopback board, or leaves the socket to the host, makes the namespaces and starts both ends. The caller closes the
// Rig.
func Start(cfg Config) (*Rig, error) {
	r := &Rig{cfg: cfg.withDefaults(), served: make(chan error, 1)}
	if err := r.start(); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Rig) start() error {
	var err error
	if r.place, err = newPlace(); err != nil {
		return err
	}
	if r.cfg.Door == "" {
		if r.server, err = loopback.NewServer(loopback.ServerConfig{Path: r.place.path(boardSocket), Size: r.cfg.Window, Vectors: r.cfg.Vectors}); err != nil {
			return err
		}
		go func() { r.served <- r.server.Serve() }()
	}
	if r.cfg.Disk {
		if err := r.makeImage(); err != nil {
			return err
		}
	}
	for i := range r.ns {
		if r.ns[i], err = netns.New(); err != nil {
			return err
		}
	}
	for _, s := range []board.Side{board.Host, board.Agent} {
		if err := r.StartSide(s); err != nil {
			return err
		}
	}
	return nil
}

// boardSocket is the name of the board's socket in the place.
const boardSocket = "board.sock"

// statusSocket returns the name of an end's socket in the place.
func statusSocket(s board.Side) string { return s.String() + ".sock" }

// StatusSocket returns the path of an end's status socket, for any process while this one runs.
func (r *Rig) StatusSocket(s board.Side) string {
	return strings.Replace(r.place.path(statusSocket(s)), "/proc/self/", fmt.Sprintf("/proc/%d/", os.Getpid()), 1)
}

// NS returns the namespace of a side.
func (r *Rig) NS(s board.Side) *netns.NS { return r.ns[s] }

// SetMTU changes the MTU that the host is started with, from its next start on.
func (r *Rig) SetMTU(mtu int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cfg.MTU = mtu
}

// Interface returns the name of device n's interface, the same on both sides.
func Interface(n int) string { return "bl" + strconv.Itoa(n) }

// args returns the flags of a side.
func (r *Rig) args(s board.Side) []string {
	ip4, ip6, extra := hostIP4, hostIP6, r.cfg.HostArgs
	if s == board.Agent {
		ip4, ip6, extra = boardIP4, boardIP6, r.cfg.AgentArgs
	}
	kind := "loopback"
	if r.cfg.Door != "" {
		kind = r.cfg.Door
	}
	a := []string{"--board", kind + ":" + r.place.childPath(boardSocket), "--status", r.place.childPath(statusSocket(s))}
	for n := 0; n < r.cfg.Nets; n++ {
		spec := fmt.Sprintf("name=%s,link=%s,offload=%v,persist=%v,addr="+ip4+"/24",
			Interface(n), r.cfg.Link, r.cfg.Offload, r.cfg.Persist, n)
		if s == board.Agent || r.cfg.MTU >= 1280 { // below, a host refuses to start with one
			spec += fmt.Sprintf(",addr="+ip6+"/64", n)
		}
		if s == board.Host {
			spec += ",mtu=" + strconv.Itoa(r.cfg.MTU)
		}
		if r.cfg.Queues != 0 {
			spec += ",queues=" + strconv.Itoa(r.cfg.Queues)
		}
		a = append(a, "--net", spec)
	}
	if r.cfg.Memory != "cached" {
		a = append(a, "--memory", r.cfg.Memory)
	}
	if s == board.Agent {
		a = append(a, "--placement", r.cfg.Placement)
		if r.cfg.Ring != "auto" {
			a = append(a, "--ring", r.cfg.Ring)
		}
	}
	if r.cfg.Disk {
		a = append(a, r.diskArgs(s)...)
	}
	if r.cfg.Console {
		a = append(a, r.consoleArgs(s)...)
	}
	if r.cfg.Rng {
		a = append(a, rngArg[s])
	}
	return append(a, extra...)
}

// rngArg are the flags of each side for a source of entropy: enough of it that a trial sees some.
var rngArg = [2]string{board.Host: "--rng=rate=1M", board.Agent: "--rng=every=50ms"}

// StartSide starts an end that does not run.
func (r *Rig) StartSide(s board.Side) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := &process{log: &tail{pass: r.cfg.Log}, done: make(chan struct{})}
	words := append(append([]string(nil), r.cfg.Command[s]...), r.args(s)...)
	p.cmd = exec.Command(words[0], words[1:]...)
	p.cmd.Env = append(os.Environ(), r.cfg.Env...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	r.place.give(p.cmd)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := r.ns[s].Start(p.cmd); err != nil {
		return fmt.Errorf("start the %s: %w", s, err)
	}
	r.proc[s] = p
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return nil
}

func (r *Rig) process(s board.Side) *process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.proc[s]
}

// Signal sends a signal to an end.
func (r *Rig) Signal(s board.Side, sig syscall.Signal) error {
	p := r.process(s)
	if p == nil {
		return fmt.Errorf("the %s does not run", s)
	}
	return p.cmd.Process.Signal(sig)
}

// Kill ends a side by SIGKILL and waits until it is gone.
func (r *Rig) Kill(s board.Side) error {
	if err := r.Signal(s, syscall.SIGKILL); err != nil {
		return err
	}
	<-r.process(s).done
	return nil
}

// Terminate ends a side by SIGTERM and returns its exit error.
func (r *Rig) Terminate(s board.Side, limit time.Duration) error {
	p := r.process(s)
	if err := r.Signal(s, syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return p.err
	case <-time.After(limit):
		p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("the %s did not end within %v of SIGTERM", s, limit)
	}
}

// PIDs returns the processes of both ends; of one that has ended, too.
func (r *Rig) PIDs() []int {
	var l []int
	for _, s := range []board.Side{board.Host, board.Agent} {
		if p := r.process(s); p != nil {
			l = append(l, p.cmd.Process.Pid)
		}
	}
	return l
}

// Log returns the end of a side's log.
func (r *Rig) Log(s board.Side) string {
	if p := r.process(s); p != nil {
		return p.log.String()
	}
	return ""
}

// Status asks a side for its status.
func (r *Rig) Status(ctx context.Context, s board.Side) (status.Program, error) {
	var p status.Program
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", r.place.path(statusSocket(s)))
		}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://boardlink/status", nil)
	if err != nil {
		return p, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return p, err
	}
	defer resp.Body.Close()
	return p, json.NewDecoder(resp.Body).Decode(&p)
}

// running tells that every device of a program carries frames, by as many queue pairs as it can.
func running(p status.Program, devices, pairs int) bool {
	n := 0
	for _, l := range p.Links {
		for _, d := range l.Devices {
			// A host is "connected" to a front end.
			if (l.State == "up" || l.State == "connected") && d.Carrier && d.Pairs >= min(pairs, d.MaxPairs) {
				n++
			}
		}
	}
	return n == devices
}

// WaitUp waits until both ends carry frames. When an end stops, or time is up, the error has
// the last lines of its log.
func (r *Rig) WaitUp(ctx context.Context) error {
	for {
		up := true
		for _, s := range []board.Side{board.Host, board.Agent} {
			p := r.process(s)
			select {
			case <-p.done:
				return &EndError{Side: s, Err: p.err, Log: lastLines(p.log.String(), 1)}
			default:
			}
			st, err := r.Status(ctx, s)
			up = up && err == nil && running(st, r.cfg.Nets, r.cfg.Queues)
			if s == board.Agent && err == nil {
				if err := refused(st); err != nil {
					return err
				}
			}
		}
		if up {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the link does not come up: host: %s; agent: %s", lastLines(r.Log(board.Host), 2), lastLines(r.Log(board.Agent), 2))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// SetupError: both ends run, but a device cannot be set up as it was asked for: too small a window
// for its frames, for instance.
type SetupError struct{ Reason string }

// Error gives the agent's reason.
func (e *SetupError) Error() string { return e.Reason }

// refused tells why an agent's devices do not come up, once it has tried a few times.
func refused(p status.Program) error {
	for _, l := range p.Links {
		for _, d := range l.Devices {
			if l.Counters["failures"] >= 3*uint64(len(l.Devices)) && l.State == "up" && !d.Carrier && d.LastError != "" {
				return &SetupError{d.LastError}
			}
		}
	}
	return nil
}

// EndError: an end stopped by itself.
type EndError struct {
	Side board.Side
	Err  error
	Log  string // its last line
}

// Error gives what the end printed last.
func (e *EndError) Error() string {
	return fmt.Sprintf("the %s stopped (%v): %s", e.Side, e.Err, e.Log)
}

// ExitCode returns the status the end exited with; -1 where a signal ended it.
func (e *EndError) ExitCode() int {
	var x *exec.ExitError
	if errors.As(e.Err, &x) {
		return x.ExitCode()
	}
	return 0
}

func lastLines(s string, n int) string {
	l := strings.Split(strings.TrimRight(s, "\n"), "\n")
	if len(l) > n {
		l = l[len(l)-n:]
	}
	return strings.Join(l, " / ")
}

// Pairs returns the addresses that reach each other over device n.
func (r *Rig) Pairs(n int) []traffic.Pair {
	pair := func(h, b string) traffic.Pair {
		return traffic.Pair{
			Host:  traffic.Endpoint{NS: r.ns[board.Host], Addr: netip.MustParseAddr(fmt.Sprintf(h, n))},
			Board: traffic.Endpoint{NS: r.ns[board.Agent], Addr: netip.MustParseAddr(fmt.Sprintf(b, n))}}
	}
	return []traffic.Pair{pair(hostIP4, boardIP4), pair(hostIP6, boardIP6)}
}

// Close ends both processes and removes everything.
func (r *Rig) Close() error {
	var errs []error
	for _, s := range []board.Side{board.Host, board.Agent} {
		p := r.process(s)
		if p == nil {
			continue
		}
		select {
		case <-p.done: // ended before: whoever ended it knows
			continue
		default:
		}
		p.cmd.Process.Signal(unix.SIGCONT)
		if err := r.Terminate(s, 5*time.Second); err != nil {
			errs = append(errs, fmt.Errorf("the %s ended badly: %w: %s", s, err, lastLines(p.log.String(), 2)))
		}
	}
	if r.server != nil {
		r.server.Close()
		<-r.served
	}
	for _, n := range r.ns {
		if n != nil {
			n.Close()
		}
	}
	if r.place != nil {
		r.place.close()
	}
	return errors.Join(errs...)
}
