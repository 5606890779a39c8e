//go:build linux

package packetbench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"golang.org/x/sys/unix"
)

// ErrNoDPDK: this machine cannot run DPDK's programs, or not now. The error that wraps it says what to do.
var ErrNoDPDK = errors.New("no comparison with DPDK")

const (
	testpmd     = "dpdk-testpmd"
	dpdkMiB     = 256 // of huge pages, for each program
	dpdkMargin  = 20 * time.Second
	dpdkSettle  = 60 * time.Millisecond
	hugePagesAt = "/proc/sys/vm/nr_hugepages"
)

// DPDK is a pair of testpmd: net_vhost (the host side) and net_virtio_user (the board side), one processor each, over
// huge pages. Between measurements both are stopped, and take no processor time.
type DPDK struct {
	Version string // of DPDK
	host    *program
	board   *program
	mixed   map[Ends]*mixed // links of which one end is ours: the second port of the testpmd at the other
	dir     string
	restore func()
}

// StartDPDK starts the pair for c's kind of ring, size of queues, order, and processors, which must be named. Where there are too
// few huge pages it reserves some, as root, and gives them back in Close. For each of ends but BothEnds, there is a link besides
// that has our end in the place of one of DPDK's, for MeasureMixed.
func StartDPDK(ctx context.Context, c Config, ends ...Ends) (_ *DPDK, err error) {
	if err := c.defaults(); err != nil {
		return nil, err
	}
	cpu := c.CPU
	if cpu[0] < 0 || cpu[1] < 0 {
		return nil, fmt.Errorf("processors %d and %d: testpmd runs on one of its own each", cpu[0], cpu[1])
	}
	path, err := exec.LookPath(testpmd)
	if err != nil {
		return nil, fmt.Errorf("%s is not installed (Debian: apt-get install dpdk-dev): %w", testpmd, ErrNoDPDK)
	}
	d := &DPDK{restore: func() {}}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	if d.restore, err = reserve(2 * dpdkMiB); err != nil {
		return nil, err
	}
	if d.dir, err = os.MkdirTemp("", "packetbench"); err != nil {
		return nil, err
	}
	sock := filepath.Join(d.dir, "vhost")
	args := func(cpu int, name, mode string, vdevs ...string) []string {
		a := []string{"--lcores", fmt.Sprintf("0@%d,1@%d", cpu, cpu), "--in-memory", "--single-file-segments", "-m", strconv.Itoa(dpdkMiB), "--no-pci", "--no-telemetry",
			"--file-prefix=" + filepath.Base(d.dir) + name}
		for _, v := range vdevs {
			a = append(a, "--vdev", v)
		}
		return append(a, "--", "-i", "--forward-mode="+mode, "--port-topology=loop", "--nb-cores=1", "--total-num-mbufs=16384", "--no-mlockall")
	}
	bit := func(on bool) int {
		if on {
			return 1
		}
		return 0
	}
	user := func(i int, path string) string {
		return fmt.Sprintf("net_virtio_user%d,path=%s,queues=1,packed_vq=%d,mrg_rxbuf=0,in_order=%d,queue_size=%d", i, path, bit(c.Ring == "packed"), bit(c.InOrder), c.Size)
	}
	hosts, boards := []string{"net_vhost0,iface=" + sock}, []string{user(0, sock)}
	d.mixed = map[Ends]*mixed{}
	for _, e := range ends {
		switch at := filepath.Join(d.dir, string(e)); e {
		case DeviceEnd: // it listens before its driver starts
			boards = append(boards, user(1, at))
			if d.mixed[e], err = startMixed(c, e, at); err != nil {
				delete(d.mixed, e)
				return nil, err
			}
		case DriverEnd:
			hosts = append(hosts, "net_vhost1,iface="+at)
		}
	}
	if d.host, err = start(ctx, d.dir, path, args(cpu[1], "host", "rxonly", hosts...)); err != nil {
		return nil, err
	}
	if len(hosts) > 1 {
		m, err := startMixed(c, DriverEnd, filepath.Join(d.dir, string(DriverEnd)))
		if err != nil {
			return nil, err
		}
		d.mixed[DriverEnd] = m
	}
	if d.board, err = start(ctx, d.dir, path, args(cpu[0], "board", "txonly", boards...)); err != nil {
		return nil, err
	}
	d.Version = version()
	return d, nil
}

// version asks the package's version: testpmd has no option for it.
func version() string {
	for _, c := range [][]string{{"dpkg-query", "-W", "-f=${Version}", "dpdk-dev"}, {"pkg-config", "--modversion", "libdpdk"}} {
		if b, err := exec.Command(c[0], c[1:]...).Output(); err == nil && len(b) > 0 {
			return strings.TrimSpace(string(b))
		}
	}
	return ""
}

// reserve sees to MiB of free huge pages.
func reserve(mib int) (restore func(), err error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	field := func(name string) int {
		m := regexp.MustCompile(`(?m)^` + name + `:\s+(\d+)`).FindSubmatch(b)
		if m == nil {
			return 0
		}
		n, _ := strconv.Atoi(string(m[1]))
		return n
	}
	kib, free := field("Hugepagesize"), field("HugePages_Free")
	if kib == 0 {
		return nil, fmt.Errorf("the kernel has no huge pages: %w", ErrNoDPDK)
	}
	need := (mib*1024 + kib - 1) / kib
	need += 2 // one of rounding for each program
	if free >= need {
		return func() {}, nil
	}
	old, err := os.ReadFile(hugePagesAt)
	if err != nil {
		return nil, err
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(old)))
	if err := os.WriteFile(hugePagesAt, []byte(strconv.Itoa(n+need-free)), 0); err != nil {
		return nil, fmt.Errorf("%d huge pages of %d KiB are needed, %d are free (as root: sysctl vm.nr_hugepages=%d): %w", need, kib, free, n+need-free, ErrNoDPDK)
	}
	restore = func() { os.WriteFile(hugePagesAt, old, 0) }
	now, _ := os.ReadFile(hugePagesAt)
	if got, _ := strconv.Atoi(strings.TrimSpace(string(now))); got < n+need-free {
		restore()
		return nil, fmt.Errorf("%d huge pages of %d KiB are needed, the kernel finds memory for %d only: %w", need, kib, free+got-n, ErrNoDPDK)
	}
	return restore, nil
}

// Close ends the programs, and gives back the huge pages that StartDPDK reserved.
func (d *DPDK) Close() {
	for _, p := range []*program{d.board, d.host} { // the board first: it talks to the host when it ends
		if p != nil {
			p.end()
		}
	}
	for _, m := range d.mixed {
		m.stop()
	}
	if d.dir != "" {
		os.RemoveAll(d.dir)
	}
	if d.restore != nil {
		d.restore()
	}
}

// Measure returns millions of frames a second, as the receiver counts them, over the duration. Echo gives round trips of one
// frame, which both sides forward.
func (d *DPDK) Measure(dir Direction, bytes int, dur time.Duration) (mpps float64, err error) {
	from, to := d.board, d.host
	if dir == HostToBoard {
		from, to = d.host, d.board
	}
	modes, burst, first := [2]string{"txonly", "rxonly"}, 32, ""
	if dir == Echo {
		// What was left under way is taken out first.
		if err := d.both("set portlist 0", "set portlist 0", "set fwd rxonly", "set fwd rxonly", "start", "start"); err != nil {
			return 0, err
		}
		time.Sleep(dpdkSettle)
		if err := d.both("stop", "stop"); err != nil {
			return 0, err
		}
		modes, burst, first = [2]string{"io", "io"}, 1, " tx_first 1"
	}
	size := fmt.Sprintf("set txpkts %d", bytes)
	set := fmt.Sprintf("set burst %d", burst)
	for _, c := range []struct {
		p    *program
		line string
	}{{from, "set portlist 0"}, {to, "set portlist 0"}, {from, "set fwd " + modes[0]}, {to, "set fwd " + modes[1]}, {from, size}, {to, size}, {from, set}, {to, set}, {to, "start"}, {from, "start" + first}} {
		if _, err := c.p.do(c.line); err != nil {
			return 0, err
		}
	}
	time.Sleep(dpdkSettle)
	_, err = to.stats(0)
	if err == nil {
		time.Sleep(dur)
		mpps, err = to.stats(0)
	}
	if serr := d.stop(from, to); err == nil {
		err = serr
	}
	if err == nil && mpps == 0 {
		err = fmt.Errorf("%s received no frames: %s", testpmd, to.tail())
	}
	return mpps, err
}

func (d *DPDK) both(lines ...string) error {
	for i, l := range lines {
		p := d.host
		if i%2 == 1 {
			p = d.board
		}
		if _, err := p.do(l); err != nil {
			return err
		}
	}
	return nil
}

func (d *DPDK) stop(from, to *program) error {
	_, err := from.do("stop")
	_, err2 := to.do("stop")
	return errors.Join(err, err2)
}

// program is a testpmd under our hand.
type program struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	gone  chan struct{}
	read  chan struct{} // all output has been read
	mu    sync.Mutex
	out   bytes.Buffer
	moved chan struct{} // there is more output
}

const prompt = "testpmd> "

// Write takes the program's output.
func (p *program) Write(b []byte) (int, error) {
	p.mu.Lock()
	p.out.Write(b)
	p.mu.Unlock()
	select {
	case p.moved <- struct{}{}:
	default:
	}
	return len(b), nil
}

// start starts the program path; what EAL leaves behind is in dir.
func start(ctx context.Context, dir, path string, args []string) (*program, error) {
	p := &program{gone: make(chan struct{}), moved: make(chan struct{}, 1)}
	p.cmd = exec.CommandContext(ctx, path, args...)
	p.cmd.Env = append(os.Environ(), "RUNTIME_DIRECTORY="+dir)
	// A terminal: to a pipe its output would come in pieces of 4 KiB, behind the prompts.
	ours, theirs, err := terminal()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", testpmd, err)
	}
	p.cmd.Stdout, p.cmd.Stderr = theirs, theirs
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		ours.Close()
		theirs.Close()
		return nil, err
	}
	started := make(chan error)
	go func() {
		// Pdeathsig comes when the thread ends that has started the program: it has to live as long.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.cmd.Wait()
			close(p.gone)
		}
	}()
	err = <-started
	theirs.Close() // the program alone has it now: ours ends with it
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("%s: %w", testpmd, err)
	}
	p.read = make(chan struct{})
	go func() {
		io.Copy(p, ours) // until EIO: the program has ended
		ours.Close()
		close(p.read)
	}()
	if _, err := p.await(); err != nil {
		p.end()
		return nil, err
	}
	return p, nil
}

// terminal returns a pseudo-terminal.
func terminal() (ours, theirs *os.File, err error) {
	m, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("/dev/ptmx: %w", err)
	}
	var name string
	if err = unix.IoctlSetPointerInt(m, unix.TIOCSPTLCK, 0); err == nil {
		var n uint32
		n, err = unix.IoctlGetUint32(m, unix.TIOCGPTN)
		name = fmt.Sprintf("/dev/pts/%d", n)
	}
	var s int
	if err == nil {
		s, err = unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		unix.Close(m)
		return nil, nil, fmt.Errorf("a terminal for its output: %w", err)
	}
	return os.NewFile(uintptr(m), "/dev/ptmx"), os.NewFile(uintptr(s), name), nil
}

// await waits for the prompt and returns what was printed before.
func (p *program) await() (string, error) {
	late := time.After(dpdkMargin)
	for {
		p.mu.Lock()
		s := p.out.String()
		i := strings.LastIndex(s, prompt)
		if i >= 0 {
			p.out.Reset()
			p.out.WriteString(s[i+len(prompt):])
		}
		p.mu.Unlock()
		if i >= 0 {
			return s[:i], nil
		}
		select {
		case <-p.moved:
		case <-p.gone:
			return "", fmt.Errorf("%s ended (%v): %s: %w", testpmd, p.cmd.ProcessState, p.tail(), ErrNoDPDK)
		case <-late:
			return "", fmt.Errorf("%s does not answer: %s: %w", testpmd, p.tail(), ErrNoDPDK)
		}
	}
}

// tail is the last that was printed, in a line.
func (p *program) tail() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := strings.Split(strings.TrimSpace(p.out.String()), "\n")
	return strings.Join(strings.Fields(strings.Join(l[max(0, len(l)-3):], "; ")), " ")
}

func (p *program) do(line string) (string, error) {
	if _, err := io.WriteString(p.in, line+"\n"); err != nil {
		return "", fmt.Errorf("%s: %w: %s", testpmd, err, p.tail())
	}
	return p.await()
}

var rxPPS = regexp.MustCompile(`Rx-pps:\s+(\d+)`)

// stats returns the rate of frames received at a port since the last call, by the program's own clock.
func (p *program) stats(port int) (mpps float64, err error) {
	s, err := p.do(fmt.Sprintf("show port stats %d", port))
	if err != nil {
		return 0, err
	}
	return parseStats(s)
}

func parseStats(s string) (mpps float64, err error) {
	m := rxPPS.FindStringSubmatch(s)
	if m == nil {
		return 0, fmt.Errorf("%s says nothing of Rx-pps: %q", testpmd, s)
	}
	n, err := strconv.ParseFloat(m[1], 64)
	return n / 1e6, err
}

func (p *program) end() {
	io.WriteString(p.in, "stop\nquit\n")
	p.in.Close()
	select {
	case <-p.gone:
	case <-time.After(2 * time.Second):
		p.cmd.Process.Kill()
		<-p.gone
	}
	<-p.read
}

// Comparison is our frames and DPDK's in turns.
type Comparison struct {
	Ends      Ends      `json:"ours"` // that are ours, in the measurements of ours
	Direction Direction `json:"direction"`
	Ring      string    `json:"ring"`
	Bytes     int       `json:"bytes"`
	InOrder   bool      `json:"in_order"`
	DPDK      string    `json:"dpdk_version,omitempty"`
	Turns     []Turn    `json:"turns"`
	// Of the steady turns, or of all where none is: millions of frames (for Echo: round trips) a second, and ours by theirs.
	Ours   benchkit.Spread `json:"ours_mpps"`
	Theirs benchkit.Spread `json:"dpdk_mpps"`
	Ratio  benchkit.Spread `json:"ratio"`
	Steady int             `json:"steady_turns"`
}

// Turn is one measurement of ours and one of DPDK's.
type Turn struct {
	Ours   float64 `json:"ours_mpps"`
	Theirs float64 `json:"dpdk_mpps"`
	Ratio  float64 `json:"ratio"`
	// Trips are the round trips of a cache line before, between, behind, in nanoseconds.
	Trips [3]float64 `json:"round_trip_ns"`
	// Steady: they differ by less than a half.
	Steady bool `json:"steady"`
}

// Compare measures in turns, ends of a link that are ours, c.Runs runs of them in each turn where both are, and DPDK's two ends for as
// long. Every step is told.
func Compare(ctx context.Context, c Config, d *DPDK, ends Ends, turns int, step func(string)) (*Comparison, error) {
	if err := c.defaults(); err != nil {
		return nil, err
	}
	if err := c.CheckEnds(ends); err != nil {
		return nil, err
	}
	r := &Comparison{Ends: ends, Direction: c.Direction, Ring: c.Ring, Bytes: c.Bytes, InOrder: c.InOrder, DPDK: d.Version}
	trip := func(t *Turn, i int) error {
		if c.CPU[0] == c.CPU[1] || c.CPU[0] < 0 || c.CPU[1] < 0 {
			return nil
		}
		var err error
		t.Trips[i], err = benchkit.RoundTrip(c.CPU[0], c.CPU[1])
		return err
	}
	for i := 0; i < turns; i++ {
		var t Turn
		what := fmt.Sprintf("%s, %s, %d bytes, turn %d of %d: ", c.Ring, c.Direction, c.Bytes, i+1, turns)
		name := "boardlink"
		if ends != BothEnds {
			name = "boardlink's " + string(ends) + " side"
		}
		step(what + name)
		if err := trip(&t, 0); err != nil {
			return nil, err
		}
		var err error
		if t.Ours, err = ours(ctx, c, d, ends); err != nil {
			return nil, err
		}
		if err := trip(&t, 1); err != nil {
			return nil, err
		}
		step(what + "DPDK")
		if t.Theirs, err = d.Measure(c.Direction, c.Bytes, c.Duration); err != nil {
			return nil, err
		}
		if err := trip(&t, 2); err != nil {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		t.Ratio = t.Ours / t.Theirs
		lo, hi := min(t.Trips[0], t.Trips[1], t.Trips[2]), max(t.Trips[0], t.Trips[1], t.Trips[2])
		t.Steady = hi <= 1.5*lo
		r.Turns = append(r.Turns, t)
	}
	r.sum()
	return r, nil
}

// ours is one measurement of ends that are ours.
func ours(ctx context.Context, c Config, d *DPDK, ends Ends) (float64, error) {
	if ends != BothEnds {
		return d.MeasureMixed(c, ends)
	}
	o, err := Run(ctx, c)
	if err != nil {
		return 0, err
	}
	if o.Corrupt > 0 {
		return 0, fmt.Errorf("%d frames were not what was sent", o.Corrupt)
	}
	return o.Mpps.Median, nil
}

// sum makes the figures of all turns.
func (r *Comparison) sum() {
	for _, t := range r.Turns {
		if t.Steady {
			r.Steady++
		}
	}
	var ours, theirs, ratio []float64
	for _, t := range r.Turns {
		if t.Steady || r.Steady == 0 {
			ours, theirs, ratio = append(ours, t.Ours), append(theirs, t.Theirs), append(ratio, t.Ratio)
		}
	}
	r.Ours, r.Theirs, r.Ratio = benchkit.SpreadOf(ours), benchkit.SpreadOf(theirs), benchkit.SpreadOf(ratio)
}
