package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/cmd/boardlink/internal/statusd"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/trial/traffic"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// hand is a link started by hand: three programs, the agent in a namespace of its own.
type hand struct {
	*box
	far *netns.NS
	p   map[string]*program
	arg map[string][]string
}

var sides = []string{"serve", "host", "agent"}

func newHand(t *testing.T) *hand {
	h := &hand{box: newBox(t), p: map[string]*program{}}
	var err error
	if h.far, err = netns.New(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.far.Close() })
	board := "loopback:" + h.path("b")
	h.arg = map[string][]string{
		"serve": {"serve", h.path("b"), "--size", "4M"},
		"host": {"host", "--board", board, "-i", "bl0", "--addr", "10.9.0.1/24", "--addr", "fd09::1/64", "--mtu", "1400",
			"--status", h.path("host.sock"), "--beat", "20ms", "--lost", "100"},
		"agent": {"agent", "--board", board, "-i", "eth7", "--addr", "10.9.0.2/24", "--addr", "fd09::2/64",
			"--status", h.path("agent.sock"), "--beat", "20ms", "--lost", "100"},
	}
	t.Cleanup(func() {
		for _, s := range []string{"agent", "host", "serve"} {
			if p := h.p[s]; p != nil {
				h.stop(s)
				if t.Failed() {
					t.Logf("%s:\n%s%s", s, p.out.String(), p.err.String())
				}
			}
		}
	})
	return h
}

func (h *hand) begin(side string) {
	h.t.Helper()
	ns := h.ns
	if side == "agent" {
		ns = h.far
	}
	h.p[side] = h.start(ns, "", h.arg[side]...)
}

// stop ends a program as an operator does: status 0, nothing left.
func (h *hand) stop(side string) {
	h.t.Helper()
	select {
	case <-h.p[side].done:
		return
	default:
	}
	if code := h.p[side].end(unix.SIGTERM, 5*time.Second); code != 0 {
		h.t.Errorf("the %s ends with status %d:\n%s", side, code, h.p[side].err.String())
	}
}

func (h *hand) status(side string) status.Link {
	p, err := statusd.Get(h.t.Context(), h.path(side+".sock"))
	if err != nil || len(p.Links) != 1 {
		return status.Link{}
	}
	return p.Links[0]
}

func (h *hand) isUp(side string) bool {
	l := h.status(side)
	return l.State == "up" && len(l.Devices) > 0 && l.Devices[0].Carrier
}

func (h *hand) waitUp() {
	h.t.Helper()
	until(h.t, 8*time.Second, "the link comes up", func() bool { return h.isUp("host") && h.isUp("agent") })
}

func (h *hand) ping() {
	h.t.Helper()
	for _, dst := range []string{"10.9.0.2", "fd09::2"} {
		ctx := withTimeout(h.t, 10*time.Second)
		if err := traffic.WaitReachable(ctx, h.ns, netip.MustParseAddr(dst)); err != nil {
			h.t.Fatal(err)
		}
		r, err := traffic.Ping(ctx, h.ns, netip.MustParseAddr(dst), traffic.PingConfig{Count: 10, Interval: time.Millisecond})
		if err != nil || r.Lost != 0 || r.Sent != 10 {
			h.t.Fatalf("ping %s: %+v, %v", dst, r, err)
		}
	}
}

// TestAnyOrder starts the three programs in every order.
func TestAnyOrder(t *testing.T) {
	netnstest.Need(t)
	for _, order := range [][3]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		name := fmt.Sprintf("%s, %s, %s", sides[order[0]], sides[order[1]], sides[order[2]])
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHand(t)
			for _, s := range order {
				h.begin(sides[s])
				time.Sleep(400 * time.Millisecond) // longer than an end waits between two tries
			}
			h.waitUp()
			h.ping()
			for _, s := range order { // and ended in the same order
				h.stop(sides[s])
			}
		})
	}
}

type ifcInfo struct {
	mtu   int
	mac   string
	up    bool
	addrs []string
}

func info(t *testing.T, ns *netns.NS, name string) (i ifcInfo) {
	t.Helper()
	err := ns.Do(func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		l, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		a := l.Attrs()
		i.mtu, i.mac, i.up = a.MTU, a.HardwareAddr.String(), a.RawFlags&unix.IFF_UP != 0 && a.RawFlags&unix.IFF_LOWER_UP != 0
		as, err := h.AddrList(l, netlink.FAMILY_ALL)
		for _, x := range as {
			if !x.IP.IsLinkLocalUnicast() {
				i.addrs = append(i.addrs, x.IPNet.String())
			}
		}
		slices.Sort(i.addrs)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// TestFlags looks at the interfaces through the kernel, and at the status of both ends.
func TestFlags(t *testing.T) {
	h := newHand(t)
	h.arg["host"] = append(h.arg["host"], "--mac", "02:00:00:00:00:0a", "--board-mac", "02:00:00:00:00:0b", "--deny", "event_idx,guest_tso6",
		"--name", "crate 1", "--queue-max", "64")
	h.arg["agent"] = append(h.arg["agent"], "--deny", "host_uso")
	for _, s := range sides {
		h.begin(s)
	}
	h.waitUp()
	h.ping()
	for _, c := range []struct {
		ns   *netns.NS
		name string
		want ifcInfo
	}{
		{h.ns, "bl0", ifcInfo{1400, "02:00:00:00:00:0a", true, []string{"10.9.0.1/24", "fd09::1/64"}}},
		{h.far, "eth7", ifcInfo{1400, "02:00:00:00:00:0b", true, []string{"10.9.0.2/24", "fd09::2/64"}}},
	} {
		if d := cmp.Diff(c.want, info(t, c.ns, c.name), cmp.AllowUnexported(ifcInfo{})); d != "" {
			t.Errorf("%s:\n%s", c.name, d)
		}
	}
	for _, s := range []string{"host", "agent"} {
		d := h.status(s).Devices[0]
		for _, f := range []string{"event_idx", "guest_tso6", "host_uso"} {
			if slices.Contains(d.Negotiated, f) {
				t.Errorf("%s: %s is negotiated", s, f)
			}
		}
		for _, f := range []string{"version_1", "mrg_rxbuf", "mtu", "mac"} {
			if !slices.Contains(d.Negotiated, f) {
				t.Errorf("%s: %s is not negotiated: %v", s, f, d.Negotiated)
			}
		}
		if d.Queues[0].Size != 64 {
			t.Errorf("%s: queue size %d", s, d.Queues[0].Size)
		}
	}
	// What the operator denied is out of "allowed", not out of "offered".
	if d := h.status("host").Devices[0]; !slices.Contains(d.Offered, "event_idx") || slices.Contains(d.Allowed, "event_idx") {
		t.Errorf("host: offered %v, allowed %v", d.Offered, d.Allowed)
	}
	if d := h.status("agent").Devices[0]; !slices.Contains(d.Offered, "host_uso") || slices.Contains(d.Allowed, "host_uso") || slices.Contains(d.Offered, "event_idx") {
		t.Errorf("agent: offered %v, allowed %v", d.Offered, d.Allowed)
	}

	st, out, errs := h.run("", "status", h.path("host.sock"), h.path("agent.sock"))
	if st != 0 || errs != "" {
		t.Errorf("status: %d, %s", st, errs)
	}
	for _, want := range []string{"host ", "agent ", "link crate 1", "loopback:" + h.path("b") + ": up", "epoch", "MiB", "tap on bl0, 02:00:00:00:00:0a, MTU 1400, carrier on",
		"tap on eth7", "negotiated", "queue 0 rx0", "queue 1 tx0", "64 descriptors", "frames "} {
		if !strings.Contains(out, want) {
			t.Errorf("status has no %q", want)
		}
	}
	if regexp.MustCompile(`(?m)^ +error `).MatchString(out) || strings.Contains(out, "%!") {
		t.Error("status tells of errors")
	}
	if t.Failed() {
		t.Log(out)
	}
	st, out, errs = h.run("", "status", "--json", h.path("host.sock"), h.path("agent.sock"))
	var ps []status.Program
	if err := json.Unmarshal([]byte(out), &ps); err != nil || st != 0 || errs != "" || len(ps) != 2 || ps[0].Side != "host" || ps[1].Side != "agent" ||
		ps[0].PID != h.p["host"].cmd.Process.Pid || ps[0].Links[0].Epoch != ps[1].Links[0].PeerEpoch {
		t.Errorf("status --json: %d, %v, %s, %+v", st, err, errs, ps)
	}
	// One of two that cannot be asked does not hide the other.
	st, out, errs = h.run("", "status", h.path("gone.sock"), h.path("agent.sock"))
	if st != 1 || strings.Count(errs, "\n") != 1 || !strings.Contains(out, "eth7") {
		t.Errorf("status of one that is gone: %d, %s, %s", st, errs, out)
	}
}

// TestSmallMemory: links with little memory, and with small queues, come up with the defaults, and pass pings and TCP both ways. What
// they go without is in the status of both ends.
func TestSmallMemory(t *testing.T) {
	netnstest.Need(t)
	for _, c := range []struct {
		name, size string
		agent      []string
		without    bool // segmentation, one way at least
	}{
		{"64K", "64K", nil, true},
		{"64K packed", "64K", []string{"--ring", "packed", "--placement", "window"}, true},
		{"256K", "256K", nil, true},
		{"512K", "512K", []string{"--queues", "1"}, false},
		{"queue of 2", "4M", []string{"--queue-size", "2", "--queues", "1"}, false},
		{"queue of 4", "4M", []string{"--queue-size", "4", "--queues", "1"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHand(t)
			h.arg["serve"][3] = c.size
			h.arg["agent"] = append(h.arg["agent"], c.agent...)
			for _, s := range sides {
				h.begin(s)
			}
			h.waitUp()
			h.ping()
			pair := traffic.Pair{Host: traffic.Endpoint{NS: h.ns, Addr: netip.MustParseAddr("10.9.0.1")}, Board: traffic.Endpoint{NS: h.far, Addr: netip.MustParseAddr("10.9.0.2")}}
			r, err := traffic.Run(withTimeout(t, 20*time.Second), []traffic.Pair{pair}, traffic.RunConfig{Duration: 50 * time.Millisecond, Ping: traffic.PingConfig{Count: 10, Interval: time.Millisecond}})
			if err != nil || !r.OK() || r.TCPGbps.BoardToHost == 0 || r.TCPGbps.HostToBoard == 0 {
				t.Errorf("%+v, %v", r, err)
			}
			for _, s := range []string{"host", "agent"} {
				d := h.status(s).Devices[0]
				if (len(d.Notes) == 1) != c.without || c.without && !strings.Contains(d.Notes[0], "frames of 64 KiB have no room") {
					t.Errorf("the %s says %q", s, d.Notes)
				}
				if d.LastError != "" || d.Counters["broken"] != 0 {
					t.Errorf("the %s: %q, broken %d times", s, d.LastError, d.Counters["broken"])
				}
				if logged := strings.Contains(h.p[s].err.String(), "have no room"); logged != c.without {
					t.Errorf("the %s's log tells of it: %v", s, logged)
				}
			}
			if _, out, _ := h.run("", "status", h.path("host.sock")); strings.Contains(out, "have no room") != c.without {
				t.Errorf("status:\n%s", out)
			}
		})
	}
}

// TestDefaultStatus: without --status, `boardlink status` finds what runs.
func TestDefaultStatus(t *testing.T) {
	h := newHand(t)
	for _, s := range []string{"host", "agent"} {
		i := slices.Index(h.arg[s], "--status")
		h.arg[s] = slices.Delete(h.arg[s], i, i+2)
	}
	const how = "run" // a /run of their own
	dir := h.path("run")
	if st, _, errs := h.run(how+"="+dir, "status"); st != 2 || strings.Count(errs, "\n") != 1 {
		t.Errorf("with nobody there: %d, %s", st, errs)
	}
	for _, s := range sides {
		ns := h.ns
		if s == "agent" {
			ns = h.far
		}
		h.p[s] = h.start(ns, how+"="+dir, h.arg[s]...)
	}
	until(t, 8*time.Second, "both are found", func() bool {
		st, out, _ := h.run(how+"="+dir, "status")
		return st == 0 && strings.Count(out, ": up") == 2
	})
	// Killed, they leave sockets, which say so and are replaced by the next start.
	h.p["host"].kill()
	st, out, errs := h.run(how+"="+dir, "status")
	if st != 0 || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "host-board0.sock: left by a program that was killed") || strings.Count(out, "agent ") != 1 {
		t.Errorf("after a kill: %d, %s, %s", st, errs, out)
	}
	h.p["host"] = h.start(h.ns, how+"="+dir, h.arg["host"]...)
	until(t, 8*time.Second, "both are found again", func() bool {
		st, out, _ := h.run(how+"="+dir, "status")
		return st == 0 && strings.Count(out, ": up") == 2
	})
	for _, s := range []string{"agent", "host", "serve"} {
		h.stop(s)
	}
	h.keep = append(h.keep, "run", "run/boardlink") // a directory of the system
}

// TestHostileStatusDirectory: where others could have made the directory of the status sockets, none is made
// there and none is asked; the programs work without.
func TestHostileStatusDirectory(t *testing.T) {
	netnstest.Need(t)
	for _, c := range []struct {
		name string
		make func(dir string) error
		want string
	}{
		{"symbolic link", func(dir string) error {
			if err := os.Mkdir(dir+".real", 0o755); err != nil {
				return err
			}
			return os.Symlink(dir+".real", dir)
		}, "symbolic link"},
		{"of another user", func(dir string) error {
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			return os.Chown(dir, 4242, 4242)
		}, "belongs to user 4242"},
		{"for everybody", func(dir string) error {
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			return os.Chmod(dir, 0o777)
		}, "mode 0777"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			run := b.own("run")
			b.own("run/boardlink")
			if err := os.Mkdir(run, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := c.make(filepath.Join(run, "boardlink")); err != nil {
				t.Fatal(err)
			}
			if c.name == "symbolic link" {
				b.own("run/boardlink.real")
			}
			h := b.start(nil, "run="+run, "host", "--board", "loopback:"+b.path("none"))
			until(t, 10*time.Second, "a host that waits", func() bool { return strings.Contains(h.err.String(), "waiting for the board") })
			if log := h.err.String(); strings.Count(log, "no status socket") != 1 || !strings.Contains(log, c.want) {
				t.Errorf("log:\n%s", log)
			}
			st, _, errs := b.run("run="+run, "status")
			if st != exitUsage || !strings.Contains(errs, c.want) || strings.Count(errs, "\n") != 2 {
				t.Errorf("status: %d, %s", st, errs)
			}
			if files := b.files(); len(files) != len(b.keep) {
				t.Errorf("files: %q", files)
			}
			if code := h.end(unix.SIGTERM, 5*time.Second); code != 0 {
				t.Errorf("ends with status %d", code)
			}
		})
	}
}

// TestStatusOfOthers: a user is told what may not be seen, and root sees it.
func TestStatusOfOthers(t *testing.T) {
	b := newBox(t)
	run := b.path("run")
	h := b.start(nil, "run="+run, "host", "--board", "loopback:"+b.path("none"))
	sock := "/run/boardlink/host-board0.sock"
	until(t, 10*time.Second, "root's is found", func() bool {
		st, out, _ := b.run("run="+run, "status")
		return st == 0 && strings.Count(out, "waiting for the board") == 1
	})
	st, out, errs := b.run("run="+run+" nobody", "status")
	if st != exitUsage || out != "" || !strings.Contains(errs, sock+": permission denied") {
		t.Errorf("as nobody: %d, %s, %s", st, out, errs)
	}
	// Another user's program, in a directory for temporary files.
	dir := b.own("boardlink-65534")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	srv, err := app.ServeStatus(filepath.Join(dir, "agent-x.sock"), func() status.Program { return status.Program{Side: "agent\x1b[31m", PID: 7} })
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	if st, out, errs := b.run("run="+run, "status"); st != 0 || !strings.Contains(errs, "belongs to user 0, not to user 65534") || strings.Contains(out, "pid 7") {
		t.Errorf("a directory that root made for somebody: %d, %s, %s", st, out, errs)
	}
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if st, out, errs := b.run("run="+run, "status"); st != 0 || errs != "" || !strings.Contains(out, "agent?[31m") || !strings.Contains(out, "pid 7") {
		t.Errorf("as root: %d, %s, %s", st, out, errs)
	}
	if code := h.end(unix.SIGTERM, 5*time.Second); code != 0 {
		t.Errorf("ends with status %d", code)
	}
	b.keep = append(b.keep, "run", "run/boardlink")
}

// TestServerRestart kills the rendezvous. The ends go on without it; who is started anew meets the other
// as soon as there is a rendezvous again.
func TestServerRestart(t *testing.T) {
	h := newHand(t)
	for _, s := range sides {
		h.begin(s)
	}
	h.waitUp()
	epoch := h.status("host").Epoch
	h.p["serve"].kill()
	h.ping()
	h.begin("serve")
	time.Sleep(500 * time.Millisecond)
	h.ping()
	if l := h.status("host"); l.Epoch != epoch || l.State != "up" {
		t.Errorf("the link was disturbed by the server's restart: %+v", l)
	}
	for _, side := range []string{"agent", "host"} {
		h.p[side].kill()
		h.begin(side)
		h.waitUp()
		h.ping()
	}
	// No server at all: the survivor waits, and says so.
	h.p["serve"].kill()
	h.p["agent"].kill()
	until(t, 5*time.Second, "the host waits", func() bool { return h.status("host").State == "waiting for the board" })
	if i := info(t, h.ns, "bl0"); i.up || len(i.addrs) != 2 {
		t.Errorf("while the board is away: %+v", i)
	}
	h.begin("agent")
	time.Sleep(300 * time.Millisecond)
	h.begin("serve")
	h.waitUp()
	h.ping()
	if log := h.p["host"].err.String(); strings.Count(log, "level=WARN")+strings.Count(log, "level=ERROR") > 8 {
		t.Errorf("the host logs too much:\n%s", log)
	}
}

// TestLinkTypes: a tap here and a tun there never come up, and each side says why, once.
func TestLinkTypes(t *testing.T) {
	netnstest.Need(t)
	for _, tun := range []string{"host", "agent"} {
		t.Run(tun+" tun", func(t *testing.T) {
			t.Parallel()
			h := newHand(t)
			h.arg[tun] = append(h.arg[tun], "--link", "tun")
			for _, s := range sides {
				h.begin(s)
			}
			warned := func(s string) int { return strings.Count(h.p[s].err.String(), "level=WARN") }
			until(t, 8*time.Second, "both warn", func() bool { return warned("host") > 0 && warned("agent") > 0 })
			until(t, 8*time.Second, "the agent tries again", func() bool { return h.status("agent").Counters["failures"] >= 5 })
			for _, s := range []string{"host", "agent"} {
				log := h.p[s].err.String()
				if n := warned(s); n != 1 || !strings.Contains(log, "--link") {
					t.Errorf("the %s warns %d times:\n%s", s, n, log)
				}
				if h.status(s).State != "up" || h.status(s).Devices[0].Carrier {
					t.Errorf("the %s: %+v", s, h.status(s))
				}
			}
			if e := h.status("agent").Devices[0].LastError; !strings.Contains(e, "--link") {
				t.Errorf("the agent's status says %q", e)
			}
			// Mended, it comes up.
			h.stop(tun)
			h.arg[tun] = h.arg[tun][:len(h.arg[tun])-2]
			h.begin(tun)
			h.waitUp()
			h.ping()
		})
	}
}

// TestPersist: with --persist the interface and its addresses outlive the program, and the next one
// takes it over.
func TestPersist(t *testing.T) {
	h := newHand(t)
	h.arg["host"] = append(h.arg["host"], "--persist")
	for _, s := range sides {
		h.begin(s)
	}
	h.waitUp()
	before := info(t, h.ns, "bl0")
	h.stop("host")
	after := info(t, h.ns, "bl0")
	if after.up || after.mac != before.mac || !slices.Equal(after.addrs, before.addrs) {
		t.Errorf("before %+v, after %+v", before, after)
	}
	h.begin("host")
	h.waitUp()
	h.ping()
	if d := cmp.Diff(before, info(t, h.ns, "bl0"), cmp.AllowUnexported(ifcInfo{})); d != "" {
		t.Errorf("taken over:\n%s", d)
	}
	h.ifcs = append(h.ifcs, "bl0") // it stays with the namespace
}
