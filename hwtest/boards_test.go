//go:build linux

package hwtest

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/hwtest/remote"
	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"golang.org/x/sys/unix"
)

var (
	boardFlag = flag.String("board", "", "a real board, e.g. ivshmem:0000:00:04.0: try the link to it (-peer)")
	peerFlag  = flag.String("peer", "", "address of the board's end, where `peer echo` and `boardlink agent` run")
	addrFlag  = flag.String("addr", "10.66.0.1/24", "address of the host's end of a real board")
)

const (
	hostPrefix, boardPrefix = "10.66.0.1/24", "10.66.0.2/24"
	hostIP, boardIP         = "10.66.0.1", "10.66.0.2"
	statusSocket            = "/tmp/status.sock"
)

var programs = map[string]string{
	"/bin/boardlink": "github.com/boardlink/boardlink/cmd/boardlink",
	"/bin/peer":      "github.com/boardlink/boardlink/hwtest/guest/peer",
}

// programPath builds the command for this machine.
var programPath = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "boardlink-hwtest-")
	if err != nil {
		return "", err
	}
	exe := filepath.Join(dir, "boardlink")
	if out, err := exec.Command("go", "build", "-o", exe, programs["/bin/boardlink"]).CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return exe, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if exe, err := programPath(); err == nil {
		os.RemoveAll(filepath.Dir(exe))
	}
	os.Exit(code)
}

func serve(t *testing.T) *loopback.Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "bl") // short: socket paths have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	s, err := loopback.NewServer(loopback.ServerConfig{Path: filepath.Join(dir, "s"), Size: 16 << 20, Vectors: 4})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { s.Serve(); close(done) }()
	t.Cleanup(func() {
		s.Close()
		<-done
		os.RemoveAll(dir)
	})
	return s
}

// end is a running host or agent, here or in a machine.
type end struct {
	t      *testing.T
	side   string
	m      *vm.VM // nil: here
	p      *vm.Process
	ns     *netns.NS
	socket string
	log    *logBuffer
}

type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func args(side, board, prefix string, extra []string) []string {
	// Emulation on a busy machine can keep a heartbeat waiting.
	a := []string{side, "--board", board, "--lost", "30"}
	joined := strings.Join(extra, " ")
	if !strings.Contains(joined, "--net") {
		a = append(a, "-i", "bl0", "--addr", prefix)
	}
	return append(a, extra...)
}

func prefixOf(side string) string {
	if side == "host" {
		return hostPrefix
	}
	return boardPrefix
}

// inVM starts an end in a machine.
func inVM(t *testing.T, m *vm.VM, side, board string, extra ...string) *end {
	t.Helper()
	e := &end{t: t, side: side, m: m, socket: statusSocket, log: new(logBuffer)}
	var err error
	e.p, err = m.Start(t.Context(), vm.Cmd{Args: append([]string{"boardlink"}, append(args(side, board, prefixOf(side), extra), "--status", e.socket)...), Stdout: e.log, Stderr: e.log})
	if err != nil {
		t.Fatal(err)
	}
	e.logOnFailure()
	return e
}

// native starts an end here, in a namespace of its own, against the loopback server.
func native(t *testing.T, s *loopback.Server, side string, extra ...string) *end {
	t.Helper()
	if netns.NeedsUser() {
		vmtest.Lacks(t, "root (CAP_NET_ADMIN, CAP_SYS_ADMIN)")
	}
	exe, err := programPath()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	e := &end{t: t, side: side, ns: ns, socket: filepath.Join(t.TempDir(), side+".sock"), log: new(logBuffer)}
	cmd := exec.Command(exe, append(args(side, "loopback:"+s.Path(), prefixOf(side), extra), "--status", e.socket)...)
	cmd.Stdout, cmd.Stderr = e.log, e.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(unix.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the %s ended badly: %v", side, err)
		}
	})
	e.logOnFailure()
	return e
}

func (e *end) logOnFailure() {
	e.t.Cleanup(func() {
		if e.t.Failed() {
			e.t.Logf("log of the %s:\n%s", e.side, e.log)
		}
	})
}

// status asks the end.
func (e *end) status() (p status.Program, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var out []byte
	if e.m != nil {
		var o vm.Output
		o, err = e.m.Run(ctx, "boardlink", "status", "--json", e.socket)
		out = o.Stdout
	} else {
		exe, _ := programPath()
		out, err = exec.CommandContext(ctx, exe, "status", "--json", e.socket).Output()
	}
	if err != nil {
		return p, err
	}
	var ps []status.Program
	if err := json.Unmarshal(out, &ps); err != nil || len(ps) != 1 {
		return p, fmt.Errorf("status %q: %v", out, err)
	}
	return ps[0], nil
}

// waitState waits until link n of the end is in a state that the function accepts.
func (e *end) waitState(n int, what string, limit time.Duration, ok func(status.Link) bool) status.Link {
	e.t.Helper()
	begin := time.Now()
	for {
		p, err := e.status()
		if err == nil && len(p.Links) > n && ok(p.Links[n]) {
			return p.Links[n]
		}
		if e.m != nil {
			select {
			case <-e.p.Done():
				out, err := e.p.Wait(context.Background())
				e.t.Fatalf("the %s stopped: %v %s", e.side, err, out.Stderr)
			default:
			}
		}
		if time.Since(begin) > limit {
			e.t.Fatalf("%s: not %s within %v: %+v, %v", e.side, what, limit, p, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// waitLog waits until the log has the text. The link may be up again sooner than its state can be asked.
func (e *end) waitLog(text string) {
	e.t.Helper()
	for begin := time.Now(); !strings.Contains(e.log.String(), text); time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > 15*time.Second {
			e.t.Fatalf("the log of the %s does not tell: %s", e.side, text)
		}
	}
}

func (e *end) waitUp(n int) status.Link {
	e.t.Helper()
	return e.waitState(n, "up", 30*time.Second, func(l status.Link) bool {
		for _, d := range l.Devices {
			if d.Type == "net" && !d.Carrier {
				return false
			}
		}
		return l.State == "up" && len(l.Devices) > 0
	})
}

// stop ends an end in a machine cleanly.
func (e *end) stop() {
	e.t.Helper()
	e.p.Signal(unix.SIGTERM)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := e.p.Wait(ctx); err != nil {
		e.t.Errorf("the %s ended badly: %v", e.side, err)
	}
}

// echo starts the far end of a check in a machine.
func echo(t *testing.T, m *vm.VM) {
	t.Helper()
	if _, err := m.Start(t.Context(), vm.Cmd{Args: []string{"peer", "echo"}}); err != nil {
		t.Fatal(err)
	}
}

// checkFrom tries the link from the namespace of a native end.
func (e *end) check(t *testing.T, addr string, c remote.Config) remote.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var r remote.Result
	var err error
	if e.m == nil {
		r, err = remote.Check(ctx, e.ns, netip.MustParseAddr(addr), c)
	} else {
		var o vm.Output
		o, err = e.m.Run(ctx, "peer", "check", addr, strconv.Itoa(max(c.Pings, 50)), strconv.FormatInt(max(c.Bytes, 4<<20), 10))
		if jerr := json.Unmarshal(o.Stdout, &r); err == nil {
			err = jerr
		}
	}
	if err != nil {
		t.Fatalf("check from the %s: %v (%+v)", e.side, err, r)
	}
	if r.Ping.Lost != 0 || r.Ping.Sent == 0 || r.Corrupt != 0 || r.Bytes == 0 {
		t.Fatalf("%+v", r)
	}
	t.Logf("from the %s: %d pings, 0 lost, round trip %.0f us median; %d MiB there and back compared, %.2f Gbit/s", e.side, r.Ping.Sent, r.RTT.P50, r.Bytes>>20, r.Gbps)
	return r
}

// bind gives a function to a driver.
func bind(t *testing.T, m *vm.VM, fn, driver string) {
	t.Helper()
	ctx := t.Context()
	dir := "/sys/bus/pci/devices/" + fn
	if err := m.Write(ctx, dir+"/driver_override", driver); err != nil {
		t.Fatal(err)
	}
	m.Write(ctx, dir+"/driver/unbind", fn)
	if err := m.Write(ctx, "/sys/bus/pci/drivers_probe", fn); err != nil {
		t.Fatal(err)
	}
}

func config(base vm.Config) vm.Config {
	base.Programs = programs
	return base
}

const slot = "0000:00:04.0"

func ivshmem(s *loopback.Server) vm.Ivshmem {
	return vm.Ivshmem{ID: "board0", Socket: s.Path(), Vectors: 4, Addr: "0x4"}
}

// interrupts returns how often the function's vectors interrupted the machine.
func interrupts(t *testing.T, m *vm.VM, fn string) (n uint64) {
	t.Helper()
	for _, line := range strings.Split(vmtest.Get(t, m, "/proc/interrupts"), "\n") {
		if !strings.Contains(line, fn) {
			continue
		}
		for _, f := range strings.Fields(line)[1:] {
			v, err := strconv.ParseUint(f, 10, 64)
			if err != nil {
				break
			}
			n += v
		}
	}
	return n
}

// rescued sums up what the poll fallback had to rescue, and what woke up by a doorbell.
func rescued(l status.Link) (rescued, wakeups uint64) {
	for _, d := range l.Devices {
		for _, q := range d.Queues {
			rescued += q.Doorbell["rescued"]
			wakeups += q.Doorbell["wakeups"]
		}
	}
	return rescued, wakeups
}

// (a) of the issue, and what belongs to it: the host in a machine, behind VFIO with an IOMMU and MSI-X; the agent here.
func TestVFIOHostNativeAgent(t *testing.T) {
	s := serve(t)
	m := vmtest.Boot(t, config(vm.Carrier(ivshmem(s))))
	t.Run("unbound", func(t *testing.T) {
		fails(t, m, 2, "is bound to no driver", "host", "--board", "ivshmem:"+slot)
		if c := probe(t, m); c.Kind != "ivshmem" || !strings.Contains(c.Missing, "driver_override") {
			t.Errorf("probe: %+v", c)
		}
	})
	bind(t, m, slot, "vfio-pci")
	t.Run("probe and doctor", func(t *testing.T) {
		c := probe(t, m)
		if c.Kind != "ivshmem" || c.Missing != "" || c.Driver != "vfio-pci" || c.IOMMUGroup == "" || !strings.Contains(c.Interrupts, "MSI-X (4)") ||
			len(c.BARs) != 3 || c.BARs[2].Size != 16<<20 {
			t.Errorf("probe: %+v", c)
		}
		out := vmtest.Run(t, m, "boardlink", "doctor", "ivshmem:"+slot)
		t.Logf("\n%s", out)
		for _, want := range []string{"uncached", "4 vectors", "doorbell to interrupt to this program", "alone in it"} {
			if !strings.Contains(out, want) {
				t.Errorf("doctor does not tell: %s", want)
			}
		}
	})
	echo(t, m)
	a := native(t, s, "agent")
	h := inVM(t, m, "host", "ivshmem:"+slot)
	h.waitUp(0)
	a.waitUp(0)
	irq := interrupts(t, m, slot)
	a.check(t, hostIP, remote.Config{Pings: 100, Bytes: 16 << 20})
	if now := interrupts(t, m, slot); now <= irq {
		t.Errorf("%d interrupts before, %d after the traffic: MSI-X is not used", irq, now)
	}
	for _, e := range []*end{h, a} {
		l := e.waitUp(0)
		if r, w := rescued(l); w == 0 || r*20 > w {
			t.Errorf("%s: %d wake-ups by doorbell, %d rescued by polling", e.side, w, r)
		}
	}
	t.Run("busy", func(t *testing.T) {
		fails(t, m, 2, "pid", "host", "--board", "ivshmem:"+slot, "--status", "none")
	})
	h.stop()
	a.waitState(0, "down", 10*time.Second, func(l status.Link) bool { return l.State != "up" })

	t.Run("generic", func(t *testing.T) {
		// The same device by a description. The agent wants to be rung as ivshmem's peers are, which a described board
		// cannot: the line says so, and the board is open all the same.
		const file = "/tmp/board.toml"
		if err := m.PutBytes(t.Context(), file, 0o644, []byte(genericIvshmem)); err != nil {
			t.Fatal(err)
		}
		h := inVM(t, m, "host", "generic:"+file+"@"+slot)
		h.waitState(0, "told of the agent's doorbell", 15*time.Second, func(l status.Link) bool {
			return l.Window.Size == 8<<20 && strings.Contains(l.LastError, "is the other end of the same kind?")
		})
		h.stop()
	})
	t.Run("no interrupts", func(t *testing.T) {
		h := inVM(t, m, "host", "ivshmem:"+slot, "--no-interrupts")
		h.waitUp(0)
		a.waitUp(0)
		a.check(t, hostIP, remote.Config{Pings: 50, Bytes: 4 << 20})
		for _, d := range h.waitUp(0).Devices {
			for _, q := range d.Queues {
				if q.Doorbell["wakeups"] != 0 {
					t.Errorf("%s: %d wake-ups by a doorbell", q.Name, q.Doorbell["wakeups"])
				}
			}
		}
		h.stop()
	})
	t.Run("killed", func(t *testing.T) {
		for range 2 {
			h := inVM(t, m, "host", "ivshmem:"+slot)
			h.waitUp(0)
			a.check(t, hostIP, remote.Config{Pings: 20, Bytes: 1 << 20})
			h.p.Kill()
			h.p.Wait(t.Context())
			a.waitState(0, "down", 10*time.Second, func(l status.Link) bool { return l.State != "up" })
		}
	})
	t.Run("memory decoding off", func(t *testing.T) {
		// The memory-enable bit is cleared under us: link down, no crash; set again: up.
		h := inVM(t, m, "host", "ivshmem:"+slot)
		h.waitUp(0)
		setMemory(t, m, slot, false)
		h.waitLog("the board is gone")
		setMemory(t, m, slot, true)
		h.waitUp(0)
		a.check(t, hostIP, remote.Config{Pings: 20, Bytes: 1 << 20})
		h.stop()
	})
	t.Run("bus mastering off", func(t *testing.T) {
		// The bus-master bit is cleared under us: it comes back, is counted, and interrupts go on.
		h := inVM(t, m, "host", "ivshmem:"+slot)
		h.waitUp(0)
		vmtest.Run(t, m, "peer", "master", slot, "off")
		h.waitState(0, "told of it", 10*time.Second, func(l status.Link) bool { return l.Counters["bus_master_restored"] == 1 })
		irq := interrupts(t, m, slot)
		a.check(t, hostIP, remote.Config{Pings: 20, Bytes: 1 << 20})
		if now := interrupts(t, m, slot); now <= irq {
			t.Errorf("%d interrupts before, %d after the traffic: bus mastering is not on again", irq, now)
		}
		if l := h.waitUp(0); l.Counters["bus_master_lost"] != 0 || l.Counters["opened"] != 1 {
			t.Errorf("counters %v", l.Counters)
		}
		h.stop()
	})
	t.Run("INTx by description", func(t *testing.T) {
		// edu has MSI too, which would come first.
		const edu, file = "0000:00:01.0", "/tmp/edu.toml"
		bind(t, m, edu, "vfio-pci")
		if err := m.PutBytes(t.Context(), file, 0o644, []byte(describedEdu)); err != nil {
			t.Fatal(err)
		}
		out, _ := m.Run(t.Context(), "boardlink", "doctor", "--json", "generic:"+file+"@"+edu)
		if !strings.Contains(string(out.Stdout), `"1 vectors"`) || strings.Contains(string(out.Stderr), "host.interrupt.kind") {
			t.Errorf("doctor: %s%s", out.Stdout, out.Stderr)
		}
	})
	t.Run("board reset", func(t *testing.T) {
		h := inVM(t, m, "host", "ivshmem:"+slot)
		h.waitUp(0)
		boardReset(t, m, h, a) // VFIO itself restores the BARs when it lets go
		h.stop()
	})
	for name, mode := range map[string]string{"uio": "uio_pci_generic", "sysfs": ""} {
		t.Run(name, func(t *testing.T) {
			if mode != "" {
				bind(t, m, slot, mode)
			} else {
				m.Write(t.Context(), "/sys/bus/pci/devices/"+slot+"/driver/unbind", slot)
			}
			h := inVM(t, m, "host", "ivshmem:"+slot+",mode="+name, "-v")
			h.waitUp(0)
			a.check(t, hostIP, remote.Config{Pings: 50, Bytes: 4 << 20})
			boardReset(t, m, h, a)
			if !strings.Contains(h.log.String(), "lost its configuration") {
				t.Error("the log does not tell what was mended")
			}
			h.stop()
		})
	}
}

// boardReset wipes BARs and command register under the host, as a reset of the board does: it is found, mended, and
// brought back.
func boardReset(t *testing.T, m *vm.VM, h, a *end) {
	t.Helper()
	vmtest.Run(t, m, "peer", "wipe", slot)
	h.waitLog("the board is gone")
	h.waitUp(0)
	a.check(t, hostIP, remote.Config{Pings: 20, Bytes: 1 << 20})
}

// genericIvshmem describes half of an ivshmem device's memory as a board's window.
const genericIvshmem = `
name = "ivshmem"
vendor = 0x1af4
device = 0x1110
[host.window]
bar = 2
size = 0x80_0000
[host.ring]
bar = 0
offset = 12
value = 0x0001_0000
`

// describedEdu describes edu as a board that interrupts by its line. Nothing is behind its window.
const describedEdu = `
vendor = 0x1234
device = 0x11e8
[host.window]
bar = 0
offset = 0x1_0000
[host.interrupt]
kind = "intx"
vectors = 1
[host.interrupt.cause]
bar = 0
offset = 0x24
clear_offset = 0x64
mask = 1
`

// fails runs a command that has to fail with the status, and one line that tells why.
func fails(t *testing.T, m *vm.VM, code int, text string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := m.Run(ctx, "boardlink", args...)
	line := strings.TrimRight(string(out.Stderr), "\n")
	if err == nil || out.Code != code || strings.Contains(line, "\n") || !strings.Contains(line, text) {
		t.Errorf("%v: status %d, want %d and one line with %q: %s", args, out.Code, code, text, line)
	}
}

// candidate is what `boardlink probe --json` tells of a function.
type candidate struct {
	Address, Kind, Driver, Missing, Interrupts string
	IOMMUGroup                                 string `json:"iommu_group"`
	BARs                                       []struct{ Size uint64 }
}

func probe(t *testing.T, m *vm.VM) candidate {
	t.Helper()
	var cs []candidate
	if err := json.Unmarshal([]byte(vmtest.Run(t, m, "boardlink", "probe", "--json")), &cs); err != nil {
		t.Fatal(err)
	}
	for _, c := range cs {
		if c.Address == slot {
			return c
		}
	}
	t.Fatalf("probe does not find %s: %+v", slot, cs)
	return candidate{}
}

// setMemory writes the memory-enable bit of the command register (PCI 3.0, 6.2.2), as another program would.
func setMemory(t *testing.T, m *vm.VM, fn string, on bool) {
	t.Helper()
	vmtest.Run(t, m, "peer", "memory", fn, map[bool]string{true: "on", false: "off"}[on])
}

// (b) an agent in a second x86 machine.
func TestVFIOHostAndAgentMachines(t *testing.T) {
	s := serve(t)
	host := vmtest.Boot(t, config(vm.Carrier(ivshmem(s))))
	agentCfg := config(vm.Carrier(ivshmem(s)))
	agentCfg.Name = "board"
	board := vmtest.Boot(t, agentCfg)
	for _, m := range []*vm.VM{host, board} {
		bind(t, m, slot, "vfio-pci")
	}
	echo(t, board)
	h := inVM(t, host, "host", "ivshmem:"+slot, "--console", "name=kernel,scrollback=1M", "--console", "name=con0")
	a := inVM(t, board, "agent", "ivshmem:"+slot, "--console", "name=kernel,kmsg", "--console", "name=con0,exec=peer shout")
	h.waitUp(0)
	a.waitUp(0)
	consoles(t, h)
	hi, ai := interrupts(t, host, slot), interrupts(t, board, slot)
	h.check(t, boardIP, remote.Config{Pings: 50, Bytes: 4 << 20})
	if hn, an := interrupts(t, host, slot), interrupts(t, board, slot); hn <= hi || an <= ai {
		t.Errorf("interrupts of the host %d to %d, of the board %d to %d: MSI-X is not used", hi, hn, ai, an)
	}
	a.stop()
	h.stop()
}

// consoles looks at the board's kernel, and talks to the program on its console, by the command in the host's machine.
func consoles(t *testing.T, h *end) {
	t.Helper()
	printed := func(name, text string) {
		t.Helper()
		for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
			o, err := h.m.Run(t.Context(), "boardlink", "console", name, "--log", "--status", h.socket)
			if err != nil {
				t.Fatalf("%v: %s", err, o.Stderr)
			}
			if strings.Contains(string(o.Stdout), text) {
				return
			}
			if time.Since(begin) > 30*time.Second {
				t.Fatalf("%s has no %q, but:\n%s", name, text, o.Stdout)
			}
		}
	}
	printed("kernel", "] Linux version ")
	for _, line := range []string{"hello", "over the bus"} {
		begin := time.Now()
		o, err := h.m.RunCmd(t.Context(), vm.Cmd{Args: []string{"boardlink", "console", "con0", "--status", h.socket}, Stdin: strings.NewReader(line + "\n")})
		if err != nil {
			t.Fatalf("%v: %s", err, o.Stderr)
		}
		printed("con0", strings.ToUpper(line)+" (0x0)\r\n")
		t.Logf("a line to the board and its answer, by two programs: %v", time.Since(begin).Round(time.Millisecond))
	}
}

// pseries boots a POWER machine with a board.
func pseries(t *testing.T, s *loopback.Server) (m *vm.VM, fn string) {
	t.Helper()
	// A host bridge of its own: all functions behind one are one IOMMU group on this machine.
	cfg := config(vm.Pseries())
	cfg.Devices = append(cfg.Devices, "-device", "spapr-pci-host-bridge,index=1,id=phb1", "-chardev", "socket,id=board0,path="+s.Path(),
		"-device", "ivshmem-doorbell,id=board0,vectors=4,chardev=board0,bus=phb1.0,addr=0x4")
	m = vmtest.Boot(t, cfg)
	fn = "0001:00:04.0"
	bind(t, m, fn, "vfio-pci")
	echo(t, m)
	return m, fn
}

// (c) an agent in a POWER machine, the host in an x86 one.
func TestPseriesBoard(t *testing.T) {
	s := serve(t)
	h := inVMx86Host(t, s)
	m, fn := pseries(t, s)
	a := inVM(t, m, "agent", "ivshmem:"+fn)
	h.waitUp(0)
	a.waitUp(0)
	irq := interrupts(t, m, fn)
	h.check(t, boardIP, remote.Config{Pings: 50, Bytes: 4 << 20})
	l := a.waitUp(0)
	if _, wakeups := rescued(l); wakeups == 0 {
		t.Errorf("no doorbell woke the agent (interrupts %d to %d)", irq, interrupts(t, m, fn))
	}
	a.stop()
	h.stop()
}

// (d) a POWER machine as the carrier, behind sPAPR TCE; the agent here.
func TestPseriesCarrier(t *testing.T) {
	s := serve(t)
	m, fn := pseries(t, s)
	a := native(t, s, "agent")
	h := inVM(t, m, "host", "ivshmem:"+fn)
	h.waitUp(0)
	a.waitUp(0)
	irq := interrupts(t, m, fn)
	a.check(t, hostIP, remote.Config{Pings: 50, Bytes: 4 << 20})
	l := h.waitUp(0)
	if _, wakeups := rescued(l); wakeups == 0 {
		t.Errorf("no doorbell woke the host (interrupts %d to %d)", irq, interrupts(t, m, fn))
	}
	h.stop()
}

// inVMx86Host boots an x86 carrier on the server and starts the host in it.
func inVMx86Host(t *testing.T, s *loopback.Server) *end {
	t.Helper()
	m := vmtest.Boot(t, config(vm.Carrier(ivshmem(s))))
	bind(t, m, slot, "vfio-pci")
	return inVM(t, m, "host", "ivshmem:"+slot)
}

// A board is pulled under traffic and plugged in again; a second one goes on meanwhile. The first has three devices.
func TestHotPlug(t *testing.T) {
	s := [2]*loopback.Server{serve(t), serve(t)}
	hot := vm.Ivshmem{ID: "hot", Socket: s[0].Path(), Vectors: 4, Port: "p0"}
	m := vmtest.Boot(t, config(vm.Carrier(hot, vm.Ivshmem{ID: "fixed", Socket: s[1].Path(), Vectors: 4, Addr: "0x4"})))
	echo(t, m)
	hotFn := hotFunction(t, m)
	bind(t, m, hotFn, "vfio-pci")
	bind(t, m, slot, "vfio-pci")
	nets := func(side int) (out []string) {
		for i, sub := range []string{"10.66.0", "10.66.1", "10.66.2"} {
			out = append(out, "--net", fmt.Sprintf("name=bl%d,addr=%s.%d/24", i, sub, side))
		}
		return out
	}
	a := native(t, s[0], "agent", nets(2)...)
	b := native(t, s[1], "agent", "--net", "name=bl0,addr=10.66.9.2/24")
	h := inVM(t, m, "host", "ivshmem:"+hotFn, append(nets(1), "--board", "ivshmem:"+slot, "--net", "board=1,name=bl9,addr=10.66.9.1/24")...)
	h.waitUp(0)
	h.waitUp(1)
	for _, ip := range []string{"10.66.0.1", "10.66.1.1", "10.66.2.1"} {
		a.check(t, ip, remote.Config{Pings: 20, Bytes: 2 << 20})
	}
	b.check(t, "10.66.9.1", remote.Config{Pings: 20, Bytes: 2 << 20})

	for range 2 {
		// Traffic that the pulling interrupts.
		ctx, cancel := context.WithCancel(t.Context())
		cut := make(chan error, 1)
		go func() {
			_, err := remote.Check(ctx, a.ns, netip.MustParseAddr("10.66.0.1"), remote.Config{Bytes: 1 << 40})
			cut <- err
		}()
		time.Sleep(time.Second)
		if err := m.PullIvshmem(t.Context(), hot); err != nil {
			t.Fatal(err)
		}
		h.waitState(0, "waiting for the board", 15*time.Second, func(l status.Link) bool {
			return l.State != "up" && !l.Devices[0].Carrier
		})
		a.waitState(0, "down", 15*time.Second, func(l status.Link) bool { return l.State != "up" })
		cancel()
		<-cut
		b.check(t, "10.66.9.1", remote.Config{Pings: 20, Bytes: 2 << 20})
		if err := m.PlugIvshmem(t.Context(), hot); err != nil {
			t.Fatal(err)
		}
		fn := hotFunction(t, m)
		if fn != hotFn {
			t.Fatalf("the board came back as %s, it was %s", fn, hotFn)
		}
		bind(t, m, hotFn, "vfio-pci")
		h.waitUp(0)
		a.waitUp(0)
		a.check(t, "10.66.1.1", remote.Config{Pings: 20, Bytes: 2 << 20})
	}
	if out := h.log.String(); !regexp.MustCompile(`the board is gone`).MatchString(out) {
		t.Error("the log does not tell that the board is gone")
	}

	// The bridge above the board is turned off and on: it is told, and no peer has left.
	const port = "0000:00:10.0"
	before := len(h.log.String())
	setMemory(t, m, port, false)
	h.waitState(0, "waiting for the board", 15*time.Second, func(l status.Link) bool {
		return l.State == "waiting for the board" && strings.Contains(l.LastError, "the bridge "+port+" above it has its memory access off")
	})
	setMemory(t, m, port, true)
	h.waitUp(0)
	if out := h.log.String()[before:]; strings.Contains(out, "peer left") || !strings.Contains(out, "board out of reach") {
		t.Errorf("the log of a bridge that was off:\n%s", out)
	}
	h.stop()

	// Plugged in before its driver is bound: it is waited for, as the board was, and the state tells what is missing.
	if err := m.PullIvshmem(t.Context(), hot); err != nil {
		t.Fatal(err)
	}
	late := inVM(t, m, "host", "ivshmem:"+hotFn, nets(1)...)
	waiting := func(what string) {
		t.Helper()
		late.waitState(0, what, 15*time.Second, func(l status.Link) bool {
			return l.State == "waiting for the board" && strings.Contains(l.LastError, what)
		})
	}
	waiting("is not there")
	if strings.Contains(late.log.String(), "removed from the bus") {
		t.Errorf("the log of a board that never was there:\n%s", late.log)
	}
	if err := m.PlugIvshmem(t.Context(), hot); err != nil {
		t.Fatal(err)
	}
	hotFunction(t, m)
	waiting("is bound to no driver")
	time.Sleep(time.Second)
	waiting("is bound to no driver")
	bind(t, m, hotFn, "vfio-pci")
	late.waitUp(0)
	a.check(t, "10.66.1.1", remote.Config{Pings: 20, Bytes: 1 << 20})
	late.stop()
}

// hotFunction waits for the function behind the root port.
func hotFunction(t *testing.T, m *vm.VM) string {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		names, err := m.Glob(t.Context(), "/sys/bus/pci/devices/0000:01:00.0")
		if err == nil && len(names) == 1 {
			return "0000:01:00.0"
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatal("no function behind the root port")
		}
	}
}

// A machine without an IOMMU.
func TestNoIOMMU(t *testing.T) {
	s := serve(t)
	m := vmtest.Boot(t, config(vm.NoIOMMU(ivshmem(s))))
	bind(t, m, slot, "vfio-pci")
	echo(t, m)
	a := native(t, s, "agent")
	h := inVM(t, m, "host", "ivshmem:"+slot)
	h.waitUp(0)
	a.waitUp(0)
	irq := interrupts(t, m, slot)
	a.check(t, hostIP, remote.Config{Pings: 50, Bytes: 4 << 20})
	if now := interrupts(t, m, slot); now <= irq {
		t.Errorf("interrupts %d to %d: MSI-X is not used", irq, now)
	}
	h.stop()
	if n := strings.Count(h.log.String(), "no IOMMU confines the board, and it masters the bus"); n != 1 {
		t.Errorf("%d warnings that nothing confines the board:\n%s", n, h.log)
	}
}

// A real board, by its address: this machine is its carrier.
func TestRealBoard(t *testing.T) {
	if *boardFlag == "" {
		t.Skip("no -board: on a machine with one, run: go test ./hwtest -run TestRealBoard -board KIND:ARG -peer ADDRESS")
	}
	exe, err := programPath()
	if err != nil {
		t.Fatal(err)
	}
	e := &end{t: t, side: "host", socket: filepath.Join(t.TempDir(), "s.sock"), log: new(logBuffer)}
	cmd := exec.Command(exe, "host", "--board", *boardFlag, "-i", "bl0", "--addr", *addrFlag, "--status", e.socket)
	cmd.Stdout, cmd.Stderr = e.log, e.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Signal(unix.SIGTERM)
	e.logOnFailure()
	e.waitUp(0)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	addr, err := netip.ParseAddr(*peerFlag)
	if err != nil {
		t.Fatalf("-peer: %v", err)
	}
	r, err := remote.Check(ctx, nil, addr, remote.Config{})
	if err != nil {
		t.Fatalf("%v (%+v)", err, r)
	}
	t.Logf("%+v", r)
}
