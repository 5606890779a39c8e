package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/hwtest/guest"
)

func (m *VM) send(f *guest.Frame) error {
	m.wmu.Lock()
	defer m.wmu.Unlock()
	select {
	case <-m.done:
		return m.Err()
	default:
	}
	// A guest that does not read must not hold up the test for ever.
	m.port.SetWriteDeadline(time.Now().Add(30 * time.Second))
	if err := guest.Write(m.port, f); err != nil {
		if e := m.Err(); e != nil {
			return e
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = ErrTimeout
		}
		return fmt.Errorf("machine %s: send %s: %w", m.Name, f.Op, err)
	}
	return nil
}

// call registers an id; the channel gets the answers until drop.
func (m *VM) call() (uint64, chan *guest.Frame) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.nextID++
	c := make(chan *guest.Frame, 64)
	m.calls[m.nextID] = c
	return m.nextID, c
}

func (m *VM) drop(id uint64) {
	m.mu.Lock()
	c := m.calls[id]
	delete(m.calls, id)
	m.mu.Unlock()
	for { // the reader may be about to send one
		select {
		case <-c:
		default:
			return
		}
	}
}

// next waits for the next answer.
func (m *VM) next(ctx context.Context, c chan *guest.Frame, what string) (*guest.Frame, error) {
	select {
	case f := <-c:
		return f, nil
	default:
	}
	select {
	case f := <-c:
		return f, nil
	case <-m.done:
		return nil, m.Err()
	case <-ctx.Done():
		return nil, fmt.Errorf("machine %s: %s: %w: %w", m.Name, what, ErrTimeout, ctx.Err())
	}
}

// request sends a frame that one EvDone or EvError answers; data collects EvData before.
func (m *VM) request(ctx context.Context, f *guest.Frame, what string, data io.Writer) error {
	_, err := m.ask(ctx, f, what, data)
	return err
}

// ask is request with the answer's Names.
func (m *VM) ask(ctx context.Context, f *guest.Frame, what string, data io.Writer) ([]string, error) {
	id, c := m.call()
	defer m.drop(id)
	f.ID = id
	if err := m.send(f); err != nil {
		return nil, err
	}
	for {
		a, err := m.next(ctx, c, what)
		if err != nil {
			return nil, err
		}
		switch a.Op {
		case guest.EvData:
			if _, err := data.Write(a.Data); err != nil {
				return nil, err
			}
		case guest.EvDone:
			return a.Names, nil
		case guest.EvError:
			return nil, fmt.Errorf("machine %s: %s: %s", m.Name, what, a.Error)
		}
	}
}

// PutBytes writes a file of the guest, with the folders above it.
func (m *VM) PutBytes(ctx context.Context, to string, perm os.FileMode, content []byte) error {
	return m.put(ctx, to, perm, bytes.NewReader(content))
}

// Put copies a file of this system to the guest, with its permissions.
func (m *VM) Put(ctx context.Context, to, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return m.put(ctx, to, st.Mode().Perm(), f)
}

func (m *VM) put(ctx context.Context, to string, perm os.FileMode, r io.Reader) error {
	b := make([]byte, guest.MaxData)
	for first := true; ; first = false {
		n, err := io.ReadFull(r, b)
		if n > 0 || first {
			f := &guest.Frame{Op: guest.OpPut, Path: to, Mode: uint32(perm), Append: !first, Data: b[:n]}
			if err := m.request(ctx, f, "put "+to, nil); err != nil {
				return err
			}
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// Get reads a file of the guest; those of proc and sysfs as well.
func (m *VM) Get(ctx context.Context, from string) ([]byte, error) {
	var b bytes.Buffer
	err := m.request(ctx, &guest.Frame{Op: guest.OpGet, Path: from}, "get "+from, &b)
	return b.Bytes(), err
}

// Write writes to an existing file of the guest in one piece, such as an attribute in sysfs.
func (m *VM) Write(ctx context.Context, to, content string) error {
	f := &guest.Frame{Op: guest.OpPut, Path: to, Append: true, Mode: 0o644, Data: []byte(content)}
	return m.request(ctx, f, fmt.Sprintf("write %q to %s", content, to), nil)
}

// Glob returns the paths of the guest that match a pattern of path/filepath; one without wildcards tells
// whether it exists.
func (m *VM) Glob(ctx context.Context, pattern string) ([]string, error) {
	return m.ask(ctx, &guest.Frame{Op: guest.OpGlob, Path: pattern}, "glob "+pattern, nil)
}

// Readlink returns where a symbolic link of the guest leads to, such as a function's driver or iommu_group in sysfs.
func (m *VM) Readlink(ctx context.Context, name string) (string, error) {
	n, err := m.ask(ctx, &guest.Frame{Op: guest.OpReadlink, Path: name}, "readlink "+name, nil)
	if err != nil {
		return "", err
	}
	return n[0], nil
}

// Load loads a module of the guest's kernel, and what it depends on, as Config.Modules does at boot.
func (m *VM) Load(ctx context.Context, spec string) error {
	x, err := m.Kernel.modules()
	if err != nil {
		return err
	}
	mods, files, err := x.resolve(ctx, []string{spec})
	if err != nil {
		return err
	}
	for _, mod := range mods {
		if err := m.Put(ctx, mod.Path, files[mod.Path]); err != nil {
			return err
		}
		if err := m.request(ctx, &guest.Frame{Op: guest.OpLoad, Path: mod.Path, Params: mod.Params}, "load "+mod.Name, nil); err != nil {
			return err
		}
	}
	return nil
}

// Unload removes a module from the guest's kernel.
func (m *VM) Unload(ctx context.Context, name string) error {
	return m.request(ctx, &guest.Frame{Op: guest.OpUnload, Path: name}, "unload "+name, nil)
}

// Cmd is a program to run in the guest.
type Cmd struct {
	// Args are the program, by its path or its name in /bin, and its arguments.
	Args []string
	// Env is added to PATH, HOME and TMPDIR.
	Env []string
	// Dir is where it runs; empty is the root.
	Dir string
	// Stdin, if set, is read to its end or until the program ends.
	Stdin io.Reader
	// Stdout and Stderr get its output as it comes; nil leaves it to Process.Output.
	Stdout, Stderr io.Writer
}

// Output is what a program left.
type Output struct {
	// Stdout and Stderr are what it wrote and what Cmd did not send elsewhere.
	Stdout, Stderr []byte
	// Code is its exit code, -1 where a signal ended it.
	Code int
	// Signal is what ended it, 0 if none.
	Signal unix.Signal
}

// ExitError says that a program in the guest failed.
type ExitError struct {
	// Program is the first of Cmd.Args.
	Program string
	Code    int
	Signal  unix.Signal
	// Stderr is the end of what it wrote.
	Stderr string
}

// Error names the program, how it ended and what it said last.
func (e *ExitError) Error() string {
	s := fmt.Sprintf("%s: exit code %d", e.Program, e.Code)
	if e.Signal != 0 {
		s = fmt.Sprintf("%s: ended by %v", e.Program, e.Signal)
	}
	if e.Stderr != "" {
		s += ": " + e.Stderr
	}
	return s
}

// Process is a program that runs in the guest.
type Process struct {
	m   *VM
	id  uint64
	cmd Cmd
	pid int

	mu   sync.Mutex
	out  Output
	err  error
	done chan struct{}
}

// Start starts a program in the guest, in a process group of its own. It runs on until it ends, is killed, or the
// machine ends; ctx is for the start only.
func (m *VM) Start(ctx context.Context, cmd Cmd) (*Process, error) {
	if len(cmd.Args) == 0 {
		return nil, fmt.Errorf("machine %s: no program named", m.Name)
	}
	id, c := m.call()
	p := &Process{m: m, id: id, cmd: cmd, done: make(chan struct{})}
	what := "start " + cmd.Args[0]
	err := m.send(&guest.Frame{ID: id, Op: guest.OpStart, Args: cmd.Args, Env: cmd.Env, Dir: cmd.Dir, Stdin: cmd.Stdin != nil})
	var f *guest.Frame
	if err == nil {
		f, err = m.next(ctx, c, what)
	}
	if err == nil && f.Op == guest.EvError {
		err = fmt.Errorf("machine %s: %s", m.Name, f.Error)
	}
	if err != nil {
		m.drop(id)
		return nil, err
	}
	p.pid = f.Pid
	go p.follow(c)
	if cmd.Stdin != nil {
		go p.feed()
	}
	return p, nil
}

// follow takes the program's output until its end.
func (p *Process) follow(c chan *guest.Frame) {
	defer close(p.done)
	defer p.m.drop(p.id)
	for {
		f, err := p.m.next(context.Background(), c, "")
		if err != nil {
			p.mu.Lock()
			p.err = err
			p.out.Code = -1
			p.mu.Unlock()
			return
		}
		switch f.Op {
		case guest.EvOutput:
			w, b := p.cmd.Stdout, &p.out.Stdout
			if f.Stream == 2 {
				w, b = p.cmd.Stderr, &p.out.Stderr
			}
			if w != nil {
				w.Write(f.Data)
				continue
			}
			p.mu.Lock()
			*b = append(*b, f.Data...)
			p.mu.Unlock()
		case guest.EvExit:
			p.mu.Lock()
			p.out.Code, p.out.Signal = f.Code, unix.Signal(f.Signal)
			if f.Code != 0 {
				t := newTail(2 << 10)
				t.Write(p.out.Stderr)
				p.err = &ExitError{Program: path.Base(p.cmd.Args[0]), Code: f.Code, Signal: p.out.Signal, Stderr: t.String()}
			}
			p.mu.Unlock()
			return
		}
	}
}

func (p *Process) feed() {
	b := make([]byte, 64<<10)
	for {
		n, err := p.cmd.Stdin.Read(b)
		f := &guest.Frame{ID: p.id, Op: guest.OpStdin, Data: b[:n], EOF: err != nil}
		if p.m.send(f) != nil || err != nil {
			return
		}
		select {
		case <-p.done:
			return
		default:
		}
	}
}

// Pid returns the process in the guest.
func (p *Process) Pid() int { return p.pid }

// Output returns what the program has written so far, and its exit code once it has ended.
func (p *Process) Output() Output {
	p.mu.Lock()
	defer p.mu.Unlock()
	o := p.out
	o.Stdout, o.Stderr = bytes.Clone(o.Stdout), bytes.Clone(o.Stderr)
	return o
}

// Done is closed when the program has ended and its output was read.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal, by Linux's number, to the process; that is no error where it has ended.
func (p *Process) Signal(s unix.Signal) error {
	return p.m.send(&guest.Frame{ID: p.id, Op: guest.OpSignal, Signal: int(s)})
}

// Kill kills the process and its children.
func (p *Process) Kill() error {
	return p.m.send(&guest.Frame{ID: p.id, Op: guest.OpSignal, Signal: int(unix.SIGKILL), Group: true})
}

// Wait waits for the end. The error is an ExitError where the program failed, a CrashError where the machine
// did; when ctx ends first, the program runs on.
func (p *Process) Wait(ctx context.Context) (Output, error) {
	select {
	case <-p.done:
	default:
		select {
		case <-p.done:
		case <-ctx.Done():
			return p.Output(), fmt.Errorf("machine %s: %s: %w: %w", p.m.Name, p.cmd.Args[0], ErrTimeout, ctx.Err())
		}
	}
	p.mu.Lock()
	err := p.err
	p.mu.Unlock()
	return p.Output(), err
}

// Run runs a program in the guest to its end. When ctx ends first the program is killed; the error matches
// ErrTimeout then, and the output so far is returned.
func (m *VM) Run(ctx context.Context, program string, args ...string) (Output, error) {
	return m.RunCmd(ctx, Cmd{Args: append([]string{program}, args...)})
}

// RunCmd is Run with all that Cmd has.
func (m *VM) RunCmd(ctx context.Context, cmd Cmd) (Output, error) {
	p, err := m.Start(ctx, cmd)
	if err != nil {
		return Output{Code: -1}, err
	}
	out, err := p.Wait(ctx)
	if errors.Is(err, ErrTimeout) {
		p.Kill()
		// A little time for its last words.
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		out, _ = p.Wait(last)
	}
	return out, err
}
