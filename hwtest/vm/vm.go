package vm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/hwtest/guest"
)

// Config is a machine. Carrier, NoIOMMU and Pseries return the standard ones.
type Config struct {
	// Name stands in messages; empty is "vm".
	Name string
	// Kernel is what it boots; nil is Linux612. It decides on the architecture.
	Kernel *KernelSpec
	// Machine is QEMU's machine type on amd64: q35 where it is empty, or microvm, whose devices are all
	// virtio-mmio (NAME-device instead of NAME-pci). It has no timer that Linux can measure its clock
	// by: Append has to hold tsc_early_khz=N.
	Machine string
	// Memory is the machine's, in MiB; 0 means 512, on pseries 1024.
	Memory int
	// SMP is the number of vCPUs; 0 means 1. There is always room for a second one, see the package's rules.
	SMP int
	// IOMMU adds an Intel IOMMU with interrupt remapping and turns it on. On pseries the IOMMU is always there.
	IOMMU bool
	// Devices are options of QEMU, such as "-device", "edu".
	Devices []string
	// Modules are loaded with all they depend on, each as "name param=value ...". A built-in one is no error.
	Modules []string
	// Append stands at the end of the kernel's command line.
	Append string
	// Files are copied into the guest's root: a path there to a file here.
	Files map[string]string
	// Programs are packages of this module that are built into the guest: a path there to an import path.
	Programs map[string]string
	// Commands run before Boot returns, in order; a failed one fails it.
	Commands [][]string
	// BootTimeout bounds the time from QEMU's start to the guest's first answer; 0 means 60 s, on pseries 120 s. What
	// comes before (a download, a build, the wait for other processes' machines) is bounded by Boot's context only.
	BootTimeout time.Duration
}

func (c *Config) arch() Arch { return c.Kernel.Arch }

// VM is a machine that runs. Its methods may be called from any goroutine.
type VM struct {
	// Name is Config.Name.
	Name string
	// Kernel is what it runs.
	Kernel *Kernel
	// BootTime is from QEMU's start to the guest's first answer.
	BootTime time.Duration

	cfg     Config
	more    []string // options of QEMU besides those of all machines
	dir     string
	port    *os.File
	qmp     *qmp
	cmd     *exec.Cmd
	console *tail

	wmu sync.Mutex // around writes to port

	mu     sync.Mutex
	nextID uint64
	calls  map[uint64]chan *guest.Frame
	klog   []KernelLine
	closed bool
	err    error // set before done is closed

	hello   chan *guest.Frame
	done    chan struct{} // QEMU has ended and all its output was read
	closing sync.Once
}

// KernelLine is a line of the guest's kernel log.
type KernelLine struct {
	// Level is 0 (emergency) to 7 (debug), as in syslog(2).
	Level int
	Text  string
}

// Boot starts a machine and waits until its first process answers. One process at a time has
// machines, as many as it wants; others wait here. The caller must Close the machine.
func Boot(ctx context.Context, cfg Config) (*VM, error) {
	if cfg.Name == "" {
		cfg.Name = "vm"
	}
	if cfg.Kernel == nil {
		cfg.Kernel = Linux612
	}
	if cfg.Memory == 0 {
		cfg.Memory = 512
		if cfg.arch() == PPC64LE {
			cfg.Memory = 1024
		}
	}
	if cfg.SMP <= 0 {
		cfg.SMP = 1
	}
	if cfg.BootTimeout <= 0 {
		cfg.BootTimeout = 60 * time.Second
		if cfg.arch() == PPC64LE {
			cfg.BootTimeout = 120 * time.Second
		}
	}
	bin := qemuBinary(cfg.arch())
	if err := needTools(bin); err != nil {
		return nil, err
	}
	k, err := Fetch(ctx, cfg.Kernel)
	if err != nil {
		return nil, err
	}
	m := &VM{Name: cfg.Name, Kernel: k, cfg: cfg, calls: map[uint64]chan *guest.Frame{}, console: newTail(256 << 10),
		hello: make(chan *guest.Frame, 1), done: make(chan struct{})}
	if m.dir, err = os.MkdirTemp("", "boardlink-vm-"); err != nil {
		return nil, err
	}
	initrd := filepath.Join(m.dir, "initrd")
	if err = m.initramfs(ctx, initrd); err == nil {
		err = takeTurn(ctx)
	}
	if err != nil {
		os.RemoveAll(m.dir)
		return nil, err
	}
	if err := m.start(bin, initrd); err != nil {
		giveTurn()
		os.RemoveAll(m.dir)
		return nil, err
	}
	if err := m.waitBoot(ctx); err != nil {
		m.Close()
		return nil, err
	}
	for _, c := range cfg.Commands {
		out, err := m.Run(ctx, c[0], c[1:]...)
		if err != nil {
			m.Close()
			return nil, fmt.Errorf("machine %s: %w\n%s%s", cfg.Name, err, out.Stdout, out.Stderr)
		}
	}
	return m, nil
}

func (m *VM) waitBoot(ctx context.Context) error {
	start := time.Now()
	limit := time.NewTimer(m.cfg.BootTimeout)
	defer limit.Stop()
	select {
	case h := <-m.hello:
		m.BootTime = time.Since(start)
		os.RemoveAll(m.dir) // QEMU has read it, and a killed test would leave it behind
		if len(h.Failed) > 0 {
			return fmt.Errorf("machine %s: its first process failed: %s; the console:\n%s", m.Name, strings.Join(h.Failed, "; "), m.Console())
		}
		return nil
	case <-m.done:
		return m.Err()
	case <-limit.C:
		return fmt.Errorf("machine %s: %w: no sign of life %v after QEMU's start; the console:\n%s", m.Name, ErrTimeout, m.cfg.BootTimeout, m.Console())
	case <-ctx.Done():
		return fmt.Errorf("machine %s: boot: %w; the console:\n%s", m.Name, ctx.Err(), m.Console())
	}
}

// microVM is a machine type without PCI.
const microVM = "microvm"

// initModules carry the port to the first process; they are loaded before what the Config names.
var initModules = []string{"virtio_pci", "virtio_console"}

func (m *VM) initramfs(ctx context.Context, path string) error {
	x, err := m.Kernel.modules()
	if err != nil {
		return err
	}
	first := initModules
	if m.cfg.Machine == microVM {
		first = []string{"virtio_mmio", "virtio_console"}
	}
	mods, files, err := x.resolve(ctx, append(append([]string{}, first...), m.cfg.Modules...))
	if err != nil {
		return err
	}
	init, err := Build(ctx, m.cfg.arch(), module+"/hwtest/guest/init")
	if err != nil {
		return err
	}
	files["/init"] = init
	for to, pkg := range m.cfg.Programs {
		if files[to], err = Build(ctx, m.cfg.arch(), pkg); err != nil {
			return err
		}
	}
	for to, from := range m.cfg.Files {
		files[to] = from
	}
	conf := guest.Config{Modules: mods, Seed: make([]byte, 64)}
	rand.Read(conf.Seed)
	b, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	a.char("dev/console", 0o600, 5, 1) // what the first process's standard streams are before it mounts /dev
	a.char("dev/null", 0o666, 1, 3)
	a.bytes(guest.ConfigPath, 0o644, b)
	for _, to := range sortedKeys(files) {
		if err := a.file(to, files[to]); err != nil {
			return err
		}
	}
	if err := a.close(); err != nil {
		return err
	}
	return f.Close()
}

func qemuBinary(a Arch) string {
	if a == PPC64LE {
		return "qemu-system-ppc64"
	}
	return "qemu-system-x86_64"
}

// args are QEMU's; the port and the monitor are sockets 3 and 4.
func (m *VM) args(initrd string) []string {
	c := &m.cfg
	maxCPUs := c.SMP
	if maxCPUs < 2 {
		maxCPUs = 2
	}
	args := []string{"-name", c.Name, "-accel", "tcg,thread=multi",
		"-smp", fmt.Sprintf("%d,maxcpus=%d", c.SMP, maxCPUs), "-m", strconv.Itoa(c.Memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", m.Kernel.Image, "-initrd", initrd,
		"-chardev", "socket,id=bl-port,fd=3", "-chardev", "socket,id=bl-qmp,fd=4", "-mon", "chardev=bl-qmp,mode=control"}
	// no_timer_check: on a busy host the timer's interrupts may stay out for longer than Linux waits at its test of them.
	line := "quiet panic=-1 oops=panic nokaslr mitigations=off net.ifnames=0 no_timer_check"
	serial := "virtio-serial-pci,id=bl-serial,max_ports=2"
	switch {
	case c.arch() == PPC64LE:
		args = append(args, "-M", "pseries")
		line = "console=hvc0 " + line
	case c.Machine == microVM:
		args = append(args, "-M", microVM, "-cpu", "max", "-global", "virtio-mmio.force-legacy=false")
		line = "console=ttyS0 " + line
		serial = "virtio-serial-device,id=bl-serial,max_ports=2"
	default:
		args = append(args, "-M", "q35", "-cpu", "max")
		line = "console=ttyS0 " + line
		serial += ",addr=0x1e,disable-legacy=on"
	}
	if c.IOMMU && c.arch() == AMD64 {
		// It has to stand before the devices that it translates for.
		args = append(args, "-device", "intel-iommu,intremap=on,caching-mode=on")
		line += " intel_iommu=on"
	}
	args = append(args, "-device", serial, "-device", "virtserialport,bus=bl-serial.0,chardev=bl-port,name="+guest.Port)
	args = append(args, c.Devices...)
	args = append(args, m.more...)
	if c.Append != "" {
		line += " " + c.Append
	}
	return append(args, "-append", line)
}

func socketpair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // so that Close ends a Read
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs"), nil
}

func (m *VM) start(bin, initrd string) error {
	port, qport, err := socketpair()
	if err != nil {
		return err
	}
	mon, qmon, err := socketpair()
	if err != nil {
		port.Close()
		qport.Close()
		return err
	}
	m.port = port
	m.cmd = exec.Command(bin, m.args(initrd)...)
	m.cmd.ExtraFiles = []*os.File{qport, qmon}
	m.cmd.Stdout, m.cmd.Stderr = m.console, m.console
	m.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	m.cmd.WaitDelay = 2 * time.Second
	started := make(chan error, 1)
	go func() {
		// The kernel sends the signal of the parent's death when the thread ends that started the
		// child: this one lives until then.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := m.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		err = m.cmd.Wait()
		m.ended(err)
	}()
	err = <-started
	qport.Close()
	qmon.Close()
	if err != nil {
		port.Close()
		mon.Close()
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	m.qmp = newQMP(mon)
	go m.read()
	return nil
}

// crashLines are what the kernel says at its end, the telling ones first.
var crashLines = []*regexp.Regexp{
	regexp.MustCompile(`Kernel panic - not syncing: .*`),
	regexp.MustCompile(`(BUG: |Oops: |general protection fault|Unable to handle kernel ).*`),
	regexp.MustCompile(`(?m)^init: .*`),
	regexp.MustCompile(`(?m)^qemu-system-[^:]*: .*`),
}

// ended is called once, when QEMU has ended.
func (m *VM) ended(err error) {
	m.mu.Lock()
	if m.closed {
		m.err = fmt.Errorf("machine %s is closed", m.Name)
	} else {
		c := &CrashError{Machine: m.Name, Reason: "QEMU ended", Console: m.console.last(4 << 10)}
		if err != nil {
			c.Reason = "QEMU: " + err.Error()
		}
		text := m.console.String()
		for _, re := range crashLines {
			if l := re.FindString(text); l != "" {
				c.Reason = strings.TrimRight(l, "\r\n ")
				break
			}
		}
		m.err = c
	}
	m.mu.Unlock()
	close(m.done)
	m.port.Close()
	m.qmp.close()
}

// read takes the guest's frames until the port closes.
func (m *VM) read() {
	r := m.port
	for {
		f, err := guest.Read(r)
		if err != nil {
			return
		}
		switch f.Op {
		case guest.EvHello:
			select {
			case m.hello <- f:
			default:
			}
		case guest.EvKernel:
			m.mu.Lock()
			m.klog = append(m.klog, KernelLine{f.Level, f.Text})
			m.mu.Unlock()
		default:
			m.mu.Lock()
			c := m.calls[f.ID]
			m.mu.Unlock()
			if c != nil {
				c <- f // each call has a goroutine that takes them until it is removed
			}
		}
	}
}

// Err returns how the machine ended: nil while it runs, a CrashError where it ended by itself.
func (m *VM) Err() error {
	select {
	case <-m.done:
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.err
	default:
		return nil
	}
}

// Done is closed when the machine has ended.
func (m *VM) Done() <-chan struct{} { return m.done }

// Console returns the end of what the machine and QEMU have printed.
func (m *VM) Console() string { return m.console.last(16 << 10) }

// KernelLog returns the guest's kernel log so far.
func (m *VM) KernelLog() []KernelLine {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]KernelLine(nil), m.klog...)
}

// WaitKernelLog waits for a line of the guest's kernel log that matches, and returns it.
func (m *VM) WaitKernelLog(ctx context.Context, re *regexp.Regexp) (string, error) {
	for n := 0; ; {
		log := m.KernelLog()
		for ; n < len(log); n++ {
			if re.MatchString(log[n].Text) {
				return log[n].Text, nil
			}
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("machine %s: no line of its kernel's log matches %q: %w", m.Name, re, ctx.Err())
		case <-m.done:
			return "", m.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Reboot resets the machine, as by its reset button, and waits until its first process answers again. What ran
// in it is gone, and nothing that the test waits for there may be under way.
func (m *VM) Reboot(ctx context.Context) error {
	// Machines are started with -no-reboot, so that a kernel that panics ends them.
	for _, action := range []string{"reset", "shutdown"} {
		if _, err := m.QMP(ctx, "set-action", map[string]any{"reboot": action}); err != nil {
			return err
		}
		if action == "shutdown" {
			return nil
		}
		if _, err := m.QMP(ctx, "system_reset", nil); err != nil {
			return err
		}
		if err := m.waitBoot(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Pid returns QEMU's process, as to stop and to continue it.
func (m *VM) Pid() int { return m.cmd.Process.Pid }

// Shutdown asks the first process to turn the machine off, waits for that, and closes the machine.
func (m *VM) Shutdown(ctx context.Context) error {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	err := m.send(&guest.Frame{Op: guest.OpPowerOff})
	if err == nil {
		select {
		case <-m.done:
		case <-ctx.Done():
			err = fmt.Errorf("machine %s: %w: it does not turn off", m.Name, ErrTimeout)
		}
	}
	return errors.Join(err, m.Close())
}

// Close ends the machine at once, as by pulling its plug, and removes what it left. It returns the
// CrashError of a machine that had ended before.
func (m *VM) Close() error {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	first := false
	m.closing.Do(func() {
		first = true
		select {
		case <-m.done:
		default:
			m.cmd.Process.Kill()
			<-m.done
		}
		os.RemoveAll(m.dir)
		giveTurn()
	})
	var c *CrashError
	if first && errors.As(m.Err(), &c) {
		return c
	}
	return nil
}

// tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex
	size int
	b    []byte
}

func newTail(size int) *tail { return &tail{size: size} }

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if len(t.b) > 2*t.size {
		t.b = append([]byte(nil), t.b[len(t.b)-t.size:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return t.last(t.size) }

// last returns the last n bytes, from the beginning of a line on.
func (t *tail) last(n int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.b
	if len(b) > n {
		b = b[len(b)-n:]
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
	}
	return strings.ReplaceAll(string(b), "\r", "")
}
