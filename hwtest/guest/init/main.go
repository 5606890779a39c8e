//go:build linux

// Command init is the first process of a test's virtual machine. It mounts what programs
// expect, loads modules, and then does what the test asks for over a virtio-serial port (package guest).
//
// In the room: mounts, modules, processes and files. Never in it: anything about boards.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/hwtest/guest"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: only the first process of a test's virtual machine runs this")
		os.Exit(2)
	}
	// The first process must not end: the kernel would panic, which the test takes for a crash
	// of the kernel.
	if err := run(); err != nil {
		fmt.Println("init: " + err.Error())
	}
	powerOff()
}

func powerOff() {
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	// A machine without a power switch: its reset ends QEMU as well.
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}

func run() error {
	var failed []string
	note := func(err error) {
		if err != nil {
			fmt.Println("init: " + err.Error())
			failed = append(failed, err.Error())
		}
	}
	for _, m := range []struct{ dev, path, kind, data string }{
		{"proc", "/proc", "proc", ""},
		{"sysfs", "/sys", "sysfs", ""},
		{"devtmpfs", "/dev", "devtmpfs", ""},
		{"devpts", "/dev/pts", "devpts", ""},
		{"tmpfs", "/dev/shm", "tmpfs", ""},
		{"tmpfs", "/tmp", "tmpfs", "mode=1777"},
		{"tmpfs", "/run", "tmpfs", ""},
		{"debugfs", "/sys/kernel/debug", "debugfs", ""},
	} {
		if err := os.MkdirAll(m.path, 0o755); err != nil {
			note(err)
			continue
		}
		if err := unix.Mount(m.dev, m.path, m.kind, 0, m.data); err != nil && m.kind != "debugfs" {
			note(fmt.Errorf("mount %s: %w", m.path, err))
		}
	}
	for name, value := range map[string]string{"PATH": "/bin:/sbin:/usr/bin:/usr/sbin", "HOME": "/root", "TMPDIR": "/tmp"} {
		os.Setenv(name, value)
	}
	os.MkdirAll("/root", 0o700)
	note(unix.Sethostname([]byte("guest")))

	var cfg guest.Config
	if b, err := os.ReadFile(guest.ConfigPath); err != nil {
		note(err)
	} else {
		note(json.Unmarshal(b, &cfg))
	}
	note(seed(cfg.Seed))
	note(loUp())
	for _, m := range cfg.Modules {
		if err := load(m.Path, m.Params); err != nil {
			note(fmt.Errorf("load the module %s: %w", m.Name, err))
		}
	}

	port, err := openPort(10 * time.Second)
	if err != nil {
		return err
	}
	s := &server{port: port, procs: map[int]*proc{}, byID: map[uint64]*proc{}}
	var u unix.Utsname
	unix.Uname(&u)
	s.send(&guest.Frame{Op: guest.EvHello, Kernel: unix.ByteSliceToString(u.Release[:]), Failed: failed})
	go s.kernelLog()
	children := make(chan os.Signal, 16)
	signal.Notify(children, unix.SIGCHLD)
	go func() {
		for range children {
			s.reap()
		}
	}()
	return s.serve()
}

// seed credits the bytes to the kernel's random number generator (random(4), RNDADDENTROPY).
func seed(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	f, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	arg := struct {
		bits, size int32
		buf        [256]byte
	}{}
	n := copy(arg.buf[:], b)
	arg.bits, arg.size = int32(8*n), int32(n)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&arg))); e != 0 {
		return fmt.Errorf("seed the random number generator: %w", e)
	}
	return nil
}

// loUp brings up the loopback interface.
func loUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// load loads a module; one that is there already is no error.
func load(path, params string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), params, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// openPort waits for the port of that name and opens it.
func openPort(limit time.Duration) (*os.File, error) {
	for end := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err != nil || strings.TrimSpace(string(b)) != guest.Port {
				continue
			}
			// Without O_NONBLOCK: the port's poll is level-triggered by an interrupt that the runtime's
			// poller would wait for, and there is one reader only.
			fd, err := unix.Open("/dev/"+filepath.Base(filepath.Dir(n)), unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err == nil {
				return os.NewFile(uintptr(fd), guest.Port), nil
			}
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("no virtio-serial port %q after %v (modules virtio_pci and virtio_console)", guest.Port, limit)
		}
	}
}

// server answers the test's frames.
type server struct {
	port *os.File
	wmu  sync.Mutex // around writes to port

	mu    sync.Mutex
	procs map[int]*proc // started and not reaped, by process id
	byID  map[uint64]*proc
}

// proc is a process that a frame started.
type proc struct {
	id    uint64
	pid   int
	stdin *os.File // nil without
	in    chan []byte
	outs  sync.WaitGroup // its readers
}

func (s *server) send(f *guest.Frame) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if err := guest.Write(s.port, f); err != nil {
		fmt.Println("init: " + err.Error())
	}
}

// answer ends a request.
func (s *server) answer(id uint64, err error) {
	if err != nil {
		s.send(&guest.Frame{ID: id, Op: guest.EvError, Error: err.Error()})
		return
	}
	s.send(&guest.Frame{ID: id, Op: guest.EvDone})
}

func (s *server) answerNames(id uint64, names []string, err error) {
	if err != nil {
		s.answer(id, err)
		return
	}
	s.send(&guest.Frame{ID: id, Op: guest.EvDone, Names: names})
}

func (s *server) serve() error {
	for {
		f, err := guest.Read(s.port)
		if err != nil {
			return fmt.Errorf("the test's port: %w", err)
		}
		switch f.Op {
		case guest.OpStart:
			if err := s.start(f); err != nil {
				s.answer(f.ID, err)
			}
		case guest.OpSignal:
			s.answerSignal(f)
		case guest.OpStdin:
			s.stdin(f)
		case guest.OpPut:
			s.answer(f.ID, put(f))
		case guest.OpGet:
			go s.get(f)
		case guest.OpGlob:
			names, err := filepath.Glob(f.Path)
			s.answerNames(f.ID, names, err)
		case guest.OpReadlink:
			to, err := os.Readlink(f.Path)
			s.answerNames(f.ID, []string{to}, err)
		case guest.OpLoad:
			s.answer(f.ID, load(f.Path, f.Params))
		case guest.OpUnload:
			s.answer(f.ID, unix.DeleteModule(f.Path, unix.O_NONBLOCK))
		case guest.OpPowerOff:
			return nil
		default:
			s.answer(f.ID, fmt.Errorf("unknown operation %q", f.Op))
		}
	}
}

// start starts a process in a group of its own.
func (s *server) start(f *guest.Frame) (err error) {
	if len(f.Args) == 0 {
		return errors.New("no program named")
	}
	path := f.Args[0]
	if !strings.Contains(path, "/") {
		found := ""
		for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
			if st, err := os.Stat(filepath.Join(dir, path)); err == nil && st.Mode()&0o111 != 0 {
				found = filepath.Join(dir, path)
				break
			}
		}
		if found == "" {
			return fmt.Errorf("start %s: not in %s of the guest", path, os.Getenv("PATH"))
		}
		path = found
	}
	var files [6]*os.File // pairs: read end, write end of the standard streams
	defer func() {
		for _, f := range files {
			if f != nil {
				f.Close()
			}
		}
	}()
	for i := 0; i < 6; i += 2 {
		if files[i], files[i+1], err = os.Pipe(); err != nil {
			return err
		}
	}
	p := &proc{id: f.ID}
	attr := &syscall.ProcAttr{
		Dir:   f.Dir,
		Env:   append(os.Environ(), f.Env...),
		Files: []uintptr{files[0].Fd(), files[3].Fd(), files[5].Fd()},
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	}
	// The reaper waits for any child. With the lock it neither takes the one that a failed exec
	// leaves nor misses one that ends at once.
	s.mu.Lock()
	pid, err := syscall.ForkExec(path, f.Args, attr)
	if err == nil {
		p.pid = pid
		s.procs[pid] = p
		s.byID[f.ID] = p
		if f.Stdin {
			p.stdin, files[1] = files[1], nil
			p.in = make(chan []byte, 1024)
			go p.feed(p.in)
		}
	}
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("start %s: %w", path, err)
	}
	s.send(&guest.Frame{ID: f.ID, Op: guest.EvStarted, Pid: pid})
	for i, r := range []*os.File{files[2], files[4]} {
		p.outs.Add(1)
		go s.output(p, i+1, r)
	}
	files[2], files[4] = nil, nil
	// The process may have ended before it was known, and its signal be gone.
	go s.reap()
	return nil
}

// feed writes standard input; a process that does not read must not hold up the port.
// It is given its channel: the field is gone as soon as the end of the input has come.
func (p *proc) feed(in <-chan []byte) {
	defer p.stdin.Close()
	for b := range in {
		if _, err := p.stdin.Write(b); err != nil {
			for range in {
			}
			return
		}
	}
}

func (s *server) stdin(f *guest.Frame) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.byID[f.ID]
	if p == nil || p.in == nil {
		return // it has ended: as a broken pipe
	}
	if len(f.Data) > 0 {
		select {
		case p.in <- f.Data:
		default:
			fmt.Println("init: a process does not read its standard input: dropped some")
		}
	}
	if f.EOF {
		close(p.in)
		p.in = nil
	}
}

func (s *server) output(p *proc, stream int, r *os.File) {
	defer p.outs.Done()
	defer r.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := r.Read(b)
		if n > 0 {
			s.send(&guest.Frame{ID: p.id, Op: guest.EvOutput, Stream: stream, Data: b[:n]})
		}
		if err != nil {
			return
		}
	}
}

// answerSignal sends a signal to a process that was started and not reaped.
func (s *server) answerSignal(f *guest.Frame) {
	s.mu.Lock()
	err := error(unix.ESRCH)
	if p := s.byID[f.ID]; p != nil {
		pid := p.pid
		if f.Group {
			pid = -pid
		}
		err = unix.Kill(pid, syscall.Signal(f.Signal))
	}
	s.mu.Unlock()
	// The request's id is the process's: its end is the answer where it worked.
	if err != nil && !errors.Is(err, unix.ESRCH) {
		s.send(&guest.Frame{Op: guest.EvKernel, Level: 4, Text: fmt.Sprintf("init: signal %d: %v", f.Signal, err)})
	}
}

// reap takes all children that have ended, orphans as well.
func (s *server) reap() {
	for {
		s.mu.Lock()
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		var p *proc
		if pid > 0 {
			if p = s.procs[pid]; p != nil {
				delete(s.procs, pid)
				delete(s.byID, p.id)
				if p.in != nil {
					close(p.in)
					p.in = nil
				}
			}
		}
		s.mu.Unlock()
		if err == unix.EINTR {
			continue
		}
		if pid <= 0 {
			return
		}
		if p != nil {
			go s.exited(p, ws)
		}
	}
}

// exited reports the end of a process behind its output. What its children that live on write
// later is not waited for.
func (s *server) exited(p *proc, ws unix.WaitStatus) {
	read := make(chan struct{})
	go func() {
		p.outs.Wait()
		close(read)
	}()
	select {
	case <-read:
	case <-time.After(time.Second):
	}
	f := &guest.Frame{ID: p.id, Op: guest.EvExit, Code: ws.ExitStatus()}
	if ws.Signaled() {
		f.Code, f.Signal = -1, int(ws.Signal())
	}
	s.send(f)
}

func put(f *guest.Frame) error {
	if err := os.MkdirAll(filepath.Dir(f.Path), 0o755); err != nil {
		return err
	}
	flags := os.O_WRONLY | os.O_CREATE | os.O_TRUNC
	if f.Append {
		flags = os.O_WRONLY | os.O_APPEND
	}
	w, err := os.OpenFile(f.Path, flags, os.FileMode(f.Mode))
	if err != nil {
		return err
	}
	if _, err := w.Write(f.Data); err != nil {
		w.Close()
		return err
	}
	return w.Close()
}

func (s *server) get(f *guest.Frame) {
	r, err := os.Open(f.Path)
	if err != nil {
		s.answer(f.ID, err)
		return
	}
	defer r.Close()
	b := make([]byte, 256<<10)
	for {
		n, err := r.Read(b)
		if n > 0 {
			s.send(&guest.Frame{ID: f.ID, Op: guest.EvData, Data: b[:n]})
		}
		if err != nil {
			if err == io.EOF {
				err = nil
			}
			s.answer(f.ID, err)
			return
		}
	}
}

// kernelLog passes on the kernel's log (Documentation/ABI/testing/dev-kmsg): each read returns a record,
// "priority,sequence,microseconds,flags;text".
func (s *server) kernelLog() {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	b := make([]byte, 16<<10)
	for {
		n, err := unix.Read(fd, b)
		if err == unix.EPIPE || err == unix.EINTR {
			continue // records were overwritten before they were read
		}
		if err != nil || n <= 0 {
			return
		}
		head, text, ok := strings.Cut(string(b[:n]), ";")
		if !ok {
			continue
		}
		prio, _, _ := strings.Cut(head, ",")
		level, _ := strconv.Atoi(prio)
		text, _, _ = strings.Cut(text, "\n") // what follows is a dictionary
		s.send(&guest.Frame{Op: guest.EvKernel, Level: level & 7, Text: text})
	}
}
