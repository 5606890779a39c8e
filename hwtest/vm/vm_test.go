package vm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
)

// serve starts an ivshmem server that ends with the test.
func serve(t *testing.T, size int64) *loopback.Server {
	t.Helper()
	s, err := loopback.NewServer(loopback.ServerConfig{Path: filepath.Join(t.TempDir(), "s"), Size: size, Vectors: 4})
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve()
	t.Cleanup(func() { s.Close() })
	return s
}

// eventually waits until f is true.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 15 s: %s", what)
		}
	}
}

func glob(t *testing.T, m *vm.VM, pattern string) []string {
	t.Helper()
	names, err := m.Glob(t.Context(), pattern)
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// ivshmems returns the sizes of BAR2 of the machine's ivshmem functions, by address.
func ivshmems(t *testing.T, m *vm.VM) map[string]uint64 {
	t.Helper()
	sizes := map[string]uint64{}
	for _, dir := range glob(t, m, "/sys/bus/pci/devices/*") {
		if vmtest.Get(t, m, dir+"/vendor") != "0x1af4" || vmtest.Get(t, m, dir+"/device") != "0x1110" {
			continue
		}
		bars := strings.Split(vmtest.Get(t, m, dir+"/resource"), "\n")
		var from, to, flags uint64
		if _, err := fmt.Sscanf(bars[2], "0x%x 0x%x 0x%x", &from, &to, &flags); err != nil {
			t.Fatalf("%s/resource: %q: %v", dir, bars[2], err)
		}
		sizes[path.Base(dir)] = to - from + 1
	}
	return sizes
}

// bind gives a function to vfio-pci and returns its IOMMU group.
func bind(t *testing.T, m *vm.VM, addr string) string {
	t.Helper()
	dir := "/sys/bus/pci/devices/" + addr
	for _, w := range [][2]string{{dir + "/driver_override", "vfio-pci"}, {"/sys/bus/pci/drivers_probe", addr}} {
		if err := m.Write(t.Context(), w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	if d, err := m.Readlink(t.Context(), dir+"/driver"); err != nil || path.Base(d) != "vfio-pci" {
		t.Fatalf("the driver of %s is %q (%v), want vfio-pci; the kernel's log: %v", addr, d, err, m.KernelLog())
	}
	g, err := m.Readlink(t.Context(), dir+"/iommu_group")
	if err != nil {
		t.Fatal(err)
	}
	return path.Base(g)
}

// TestCarrier boots the standard carrier once for all that needs no machine of its own.
func TestCarrier(t *testing.T) {
	odd := filepath.Join(t.TempDir(), "odd")
	if err := os.WriteFile(odd, []byte("12345"), 0o640); err != nil {
		t.Fatal(err)
	}
	direct, port := serve(t, 4<<20), serve(t, 16<<20)
	hot := vm.Ivshmem{ID: "hot", Port: "p1", Empty: true, Socket: direct.Path()}
	cfg := vm.Carrier(vm.Ivshmem{ID: "direct", Socket: direct.Path(), Addr: "0x4"},
		vm.Ivshmem{ID: "port", Socket: port.Path(), Port: "p0"}, hot)
	cfg.Programs = map[string]string{"/bin/tool": "github.com/boardlink/boardlink/hwtest/guest/tool"}
	cfg.Files = map[string]string{"/odd": odd}
	cfg.Commands = [][]string{{"tool", "say", "hello"}}
	m := vmtest.Boot(t, cfg)
	t.Logf("Linux %s, up after %.1f s", m.Kernel.Release, m.BootTime.Seconds())

	t.Run("modules", func(t *testing.T) {
		loaded := vmtest.Get(t, m, "/proc/modules")
		for _, name := range []string{"vfio_iommu_type1", "vfio_pci", "vfio", "uio_pci_generic", "tun", "veth"} {
			if !regexp.MustCompile(`(?m)^` + name + ` `).MatchString(loaded) {
				t.Errorf("%s is not loaded: %s", name, loaded)
			}
		}
		for _, dev := range []string{"/dev/vfio/vfio", "/dev/net/tun"} {
			if len(glob(t, m, dev)) == 0 {
				t.Errorf("no %s", dev)
			}
		}
		if err := m.Unload(t.Context(), "veth"); err != nil {
			t.Error(err)
		}
		if err := m.Load(t.Context(), "veth"); err != nil {
			t.Error(err)
		}
		if err := m.Load(t.Context(), "bridge"); err != nil { // brings stp and llc
			t.Error(err)
		}
		if l := vmtest.Get(t, m, "/proc/modules"); !strings.Contains(l, "veth ") || !strings.Contains(l, "llc ") {
			t.Errorf("veth and bridge were not loaded: %s", l)
		}
		if err := m.Load(t.Context(), "no-such-module"); err == nil || !strings.Contains(err.Error(), "no module no_such_module") {
			t.Errorf("load no-such-module: %v", err)
		}
		if err := m.Load(t.Context(), "tun no_such_parameter=1"); err != nil { // loaded already
			t.Error(err)
		}
	})

	t.Run("ivshmem", func(t *testing.T) {
		got := ivshmems(t, m)
		if len(got) != 2 || got["0000:00:04.0"] != 4<<20 {
			t.Fatalf("ivshmem functions %v, want one of 4 MiB at 0000:00:04.0 and one of 16 MiB", got)
		}
		groups := map[string]bool{}
		for addr, size := range got {
			if size != 4<<20 && size != 16<<20 {
				t.Errorf("BAR2 of %s has %d bytes", addr, size)
			}
			g := bind(t, m, addr)
			groups[g] = true
			if len(glob(t, m, "/dev/vfio/"+g)) != 1 {
				t.Errorf("%s: no /dev/vfio/%s", addr, g)
			}
		}
		if len(groups) != 2 {
			t.Errorf("IOMMU groups %v, want one for each function", groups)
		}
		if direct.Clients() != 1 || port.Clients() != 1 {
			t.Errorf("the servers have %d and %d clients, want 1 each", direct.Clients(), port.Clients())
		}
	})

	t.Run("hot-plug", func(t *testing.T) {
		before := len(ivshmems(t, m))
		for range 5 { // QEMU died at the second without what PullIvshmem does
			if err := m.PlugIvshmem(t.Context(), hot); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the plugged function appears", func() bool { return len(ivshmems(t, m)) == before+1 })
			if n := direct.Clients(); n != 2 {
				t.Errorf("the server has %d clients, want 2", n)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			if err := m.PullIvshmem(ctx, hot); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the pulled function vanishes", func() bool { return len(ivshmems(t, m)) == before })
			eventually(t, "its client leaves the server", func() bool { return direct.Clients() == 1 })
		}
		if err := m.DeviceDel(t.Context(), "nobody"); err == nil || !strings.Contains(err.Error(), "nobody") {
			t.Errorf("pull a device that is not there: %v", err)
		}
	})

	t.Run("programs", func(t *testing.T) { programs(t, m) })
	t.Run("files", func(t *testing.T) { files(t, m, odd) })

	t.Run("RunGoTest", func(t *testing.T) {
		vmtest.RunGoTest(t, m, "github.com/boardlink/boardlink/hwtest/guest", nil, "-test.run=^(TestFrame|FuzzRead)", "-rapid.checks=20")
	})

	t.Run("kernel's log", func(t *testing.T) {
		if err := m.Write(t.Context(), "/dev/kmsg", "<4>a word from the test\n"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := m.WaitKernelLog(ctx, regexp.MustCompile(`^a word from the test$`)); err != nil {
			t.Error(err)
		}
		if _, err := m.WaitKernelLog(ctx, regexp.MustCompile(`DMAR: Intel\(R\) Virtualization Technology for Directed I/O`)); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := m.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if _, err := m.Run(t.Context(), "tool", "say"); err == nil {
		t.Error("a closed machine runs a program")
	}
}

func programs(t *testing.T, m *vm.VM) {
	ctx := t.Context()
	out, err := m.RunCmd(ctx, vm.Cmd{Args: []string{"tool", "say", "a", "b c"}, Env: []string{"TOOL=x y"}, Dir: "/sys"})
	if err != nil || string(out.Stdout) != "a b c\n" || string(out.Stderr) != "/sys x y\n" || out.Code != 0 {
		t.Errorf("say: %+v, %v", out, err)
	}
	var exit *vm.ExitError
	out, err = m.Run(ctx, "/bin/tool", "exit", "7")
	if !errors.As(err, &exit) || exit.Code != 7 || out.Code != 7 || !strings.Contains(err.Error(), "as asked") {
		t.Errorf("exit 7: %+v, %v", out, err)
	}
	for _, p := range []string{"no-such-program", "/proc/version"} {
		if _, err := m.Run(ctx, p); err == nil || !strings.Contains(err.Error(), p) {
			t.Errorf("run %s: %v", p, err)
		}
	}
	if _, err := m.RunCmd(ctx, vm.Cmd{Args: []string{"tool"}, Dir: "/no/such/folder"}); err == nil {
		t.Error("ran in a folder that is not there")
	}

	const many = 3<<20 + 5
	if out, err = m.Run(ctx, "tool", "pour", strconv.Itoa(many)); err != nil || len(out.Stdout) != many {
		t.Errorf("pour: %d bytes, want %d: %v", len(out.Stdout), many, err)
	}
	in := bytes.Repeat([]byte("in and out\n"), 20000)
	cctx, stop := context.WithTimeout(ctx, time.Minute)
	out, err = m.RunCmd(cctx, vm.Cmd{Args: []string{"tool", "cat"}, Stdin: bytes.NewReader(in)})
	stop()
	if err != nil || !bytes.Equal(out.Stdout, in) {
		t.Errorf("cat: %d bytes, want %d: %v", len(out.Stdout), len(in), err)
	}

	// A process that streams, two at a time, each with its own signal.
	r, w := io.Pipe()
	a, err := m.Start(ctx, vm.Cmd{Args: []string{"tool", "wait"}, Stdout: w})
	if err != nil {
		t.Fatal(err)
	}
	b, err := m.Start(ctx, vm.Cmd{Args: []string{"tool", "wait"}})
	if err != nil {
		t.Fatal(err)
	}
	line := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(r, line); err != nil || string(line) != "ready\n" {
		t.Errorf("streamed %q, %v", line, err)
	}
	go io.Copy(io.Discard, r)
	eventually(t, "both wait", func() bool { return string(b.Output().Stdout) == "ready\n" })
	if err := errors.Join(a.Signal(unix.SIGTERM), b.Signal(unix.SIGUSR1)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Wait(ctx); err != nil {
		t.Error(err)
	}
	if out, err := b.Wait(ctx); err != nil || !strings.Contains(string(out.Stdout), "user defined signal 1") {
		t.Errorf("signalled: %+v, %v", out, err)
	}
	if err := a.Signal(unix.SIGTERM); err != nil {
		t.Errorf("signal a process that has ended: %v", err)
	}

	// Time-outs and kills.
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	out, err = m.Run(short, "tool", "wait")
	if !errors.Is(err, vm.ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) || out.Signal != unix.SIGKILL || string(out.Stdout) != "ready\n" {
		t.Errorf("a program that takes too long: %+v, %v", out, err)
	}

	// The first process takes orphans.
	out, err = m.Run(ctx, "tool", "orphan")
	pid := strings.TrimSpace(string(out.Stdout))
	if err != nil || pid == "" {
		t.Fatalf("orphan: %+v, %v", out, err)
	}
	eventually(t, "the orphan is gone", func() bool { return len(glob(t, m, "/proc/"+pid)) == 0 })
}

func files(t *testing.T, m *vm.VM, odd string) {
	ctx := t.Context()
	// What the initramfs holds behind a file whose length is no multiple of 4 is in step.
	if got := vmtest.Get(t, m, "/odd"); got != "12345" {
		t.Errorf("/odd of the initramfs holds %q", got)
	}
	if err := m.Put(ctx, "/new/folder/odd", odd); err != nil {
		t.Error(err)
	}
	if got := vmtest.Get(t, m, "/new/folder/odd"); got != "12345" {
		t.Errorf("/new/folder/odd holds %q", got)
	}
	for _, size := range []int{0, 1, 1 << 20, 2<<20 + 1} {
		content := bytes.Repeat([]byte{byte(size), 1, 2}, size/3+1)[:size]
		if err := m.PutBytes(ctx, "/tmp/f", 0o600, content); err != nil {
			t.Fatal(err)
		}
		got, err := m.Get(ctx, "/tmp/f")
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes came back as %d: %v", size, len(got), err)
		}
	}
	if _, err := m.Get(ctx, "/no/such/file"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("get /no/such/file: %v", err)
	}
	if _, err := m.Readlink(ctx, "/odd"); err == nil {
		t.Error("a file was read as a link")
	}
	if err := m.Write(ctx, "/sys/bus/pci/drivers_probe", "nonsense"); err == nil {
		t.Error("sysfs took nonsense")
	}
}

// TestCrash crashes the kernel under a program.
func TestCrash(t *testing.T) {
	m, err := vm.Boot(t.Context(), vm.Config{Name: "victim", Programs: map[string]string{"/bin/tool": "github.com/boardlink/boardlink/hwtest/guest/tool"}})
	if vm.IsMissing(err) {
		vmtest.Lacks(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	p, err := m.Start(t.Context(), vm.Cmd{Args: []string{"tool", "wait"}})
	if err != nil {
		t.Fatal(err)
	}
	m.Write(t.Context(), "/proc/sysrq-trigger", "c") // the answer may not come any more
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var crash *vm.CrashError
	if _, err := p.Wait(ctx); !errors.As(err, &crash) {
		t.Fatalf("a program whose machine crashed: %v", err)
	}
	if crash.Machine != "victim" || !strings.Contains(crash.Reason, "Kernel panic - not syncing: sysrq triggered crash") || !strings.Contains(crash.Console, "Call Trace") {
		t.Errorf("crash: %q\n%s", crash.Reason, crash.Console)
	}
	if _, err := m.Run(ctx, "tool", "say"); !errors.As(err, &crash) {
		t.Errorf("run on a crashed machine: %v", err)
	}
	if _, err := m.QMP(ctx, "query-status", nil); !errors.As(err, &crash) {
		t.Errorf("QMP on a crashed machine: %v", err)
	}
	if err := m.Close(); !errors.As(err, &crash) {
		t.Errorf("close a crashed machine: %v", err)
	}
}

func TestBootFails(t *testing.T) {
	boot := func(cfg vm.Config) error {
		m, err := vm.Boot(t.Context(), cfg)
		if vm.IsMissing(err) {
			vmtest.Lacks(t, "%v", err)
		}
		if err == nil {
			m.Close()
			t.Fatalf("%+v boots", cfg)
		}
		return err
	}
	var crash *vm.CrashError
	if err := boot(vm.Config{BootTimeout: 50 * time.Millisecond}); !errors.Is(err, vm.ErrTimeout) {
		t.Errorf("a boot that takes too long: %v", err)
	}
	if err := boot(vm.Config{Append: "rdinit=/no/such/program init=/no/such/program"}); !errors.As(err, &crash) || !strings.Contains(crash.Reason, "Kernel panic") {
		t.Errorf("a boot without a first process: %v", err)
	}
	if err := boot(vm.Config{Devices: []string{"-device", "no-such-device"}}); !errors.As(err, &crash) || !strings.Contains(crash.Reason, "no-such-device") {
		t.Errorf("a device that QEMU does not know: %v", err)
	}
	if err := boot(vm.Config{Modules: []string{"no_such_module"}}); !strings.Contains(err.Error(), "no module no_such_module") {
		t.Errorf("a module that is not there: %v", err)
	}
	if err := boot(vm.Config{Modules: []string{"tun"}, Commands: [][]string{{"/bin/nothing"}}}); !strings.Contains(err.Error(), "/bin/nothing") {
		t.Errorf("a command that is not there: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := vm.Boot(ctx, vm.Config{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a boot under a context that has ended: %v", err)
	}
}

// TestParentDies kills a test process that has a machine: QEMU goes with it, and the next process gets its turn.
func TestParentDies(t *testing.T) {
	if os.Getenv("VM_TEST_PARENT") != "" {
		m, err := vm.Boot(t.Context(), vm.Config{})
		if err != nil {
			fmt.Println("failed", err)
			return
		}
		fmt.Println("pid", m.Pid())
		time.Sleep(time.Minute)
		return
	}
	// Whatever is missing is missing for the child as well: this says it.
	if m, err := vm.Boot(t.Context(), vm.Config{}); vm.IsMissing(err) {
		vmtest.Lacks(t, "%v", err)
	} else if err != nil {
		t.Fatal(err)
	} else {
		m.Close()
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestParentDies$", "-test.v")
	cmd.Env = append(os.Environ(), "VM_TEST_PARENT=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	pid := 0
	for text := ""; pid == 0; {
		b := make([]byte, 4096)
		n, err := out.Read(b)
		text += string(b[:n])
		if f := regexp.MustCompile(`pid (\d+)\n`).FindStringSubmatch(text); f != nil {
			pid, _ = strconv.Atoi(f[1])
		} else if err != nil || strings.Contains(text, "failed") {
			t.Fatalf("the child has no machine: %v: %s", err, text)
		}
	}
	if err := unix.Kill(pid, 0); err != nil {
		t.Fatalf("QEMU, process %d: %v", pid, err)
	}
	// While it lives it is its turn.
	waits, cancel := context.WithCancel(t.Context())
	said := vm.Logf
	vm.Logf = func(format string, args ...any) {
		t.Logf(format, args...)
		cancel()
	}
	_, err = vm.Boot(waits, vm.Config{})
	vm.Logf = said
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), ".lock") {
		t.Errorf("a second process's machine: %v", err)
	}
	cmd.Process.Kill()
	eventually(t, "QEMU ends with its parent", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || bytes.Contains(b, []byte(") Z "))
	})
	m := vmtest.Boot(t, vm.Config{})
	t.Logf("up after %.1f s", m.BootTime.Seconds())
}

func TestPlain61(t *testing.T) {
	vmtest.Short(t, "a machine with Linux 6.1")
	cfg := vm.Plain(vm.Ivshmem{ID: "b", Socket: serve(t, 1<<20).Path(), Addr: "0x4"})
	cfg.Kernel = vm.Linux61
	m := vmtest.Boot(t, cfg)
	t.Logf("Linux %s, up after %.1f s", m.Kernel.Release, m.BootTime.Seconds())
	if got := ivshmems(t, m); len(got) != 1 || got["0000:00:04.0"] != 1<<20 {
		t.Errorf("ivshmem functions %v", got)
	}
	if g := glob(t, m, "/sys/kernel/iommu_groups/*"); len(g) != 0 {
		t.Errorf("IOMMU groups %v in a machine without an IOMMU", g)
	}
}

func TestPseries(t *testing.T) {
	vmtest.Short(t, "a machine with a POWER processor")
	cfg := vm.Pseries(vm.Ivshmem{ID: "b", Socket: serve(t, 4<<20).Path(), Addr: "0x4"})
	m := vmtest.Boot(t, cfg)
	t.Logf("Linux %s, up after %.1f s", m.Kernel.Release, m.BootTime.Seconds())
	got := ivshmems(t, m)
	if len(got) != 1 || got["0000:00:04.0"] != 4<<20 {
		t.Fatalf("ivshmem functions %v", got)
	}
	if g := bind(t, m, "0000:00:04.0"); len(glob(t, m, "/dev/vfio/"+g)) != 1 {
		t.Errorf("no /dev/vfio/%s", g)
	}
	vmtest.RunGoTest(t, m, "github.com/boardlink/boardlink/hwtest/guest", nil, "-test.run=^TestFrameBounds$")
}

func TestNoIOMMU(t *testing.T) {
	vmtest.Short(t, "a machine with a vfio.ko that is built for it")
	m := vmtest.Boot(t, vm.NoIOMMU(vm.Ivshmem{ID: "b", Socket: serve(t, 4<<20).Path(), Addr: "0x4"}))
	t.Logf("Linux %s, up after %.1f s", m.Kernel.Release, m.BootTime.Seconds())
	if g := bind(t, m, "0000:00:04.0"); len(glob(t, m, "/dev/vfio/noiommu-"+g)) != 1 {
		t.Errorf("no /dev/vfio/noiommu-%s: %v", g, glob(t, m, "/dev/vfio/*"))
	}
}
