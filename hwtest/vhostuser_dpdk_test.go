//go:build linux

package hwtest

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var (
	fullFlag  = flag.Bool("full", false, "with DPDK: all combinations of options, not the chosen ones")
	roundFlag = flag.Int("rounds", 2, "with DPDK: how often each side is started; with a guest: how often what is repeated is done, half of it or twice")
)

// pmd is DPDK's testpmd, which sends each frame back by the queue that brought it.
type pmd struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.Closer
	out   logBuffer
	ended bool
}

// pmdKind is how testpmd drives or serves a device.
type pmdKind struct {
	packed, mergeable, inOrder, vector bool
	pairs                              int
}

func (k pmdKind) String() string {
	s := "split"
	if k.packed {
		s = "packed"
	}
	for _, o := range []struct {
		on   bool
		name string
	}{{k.mergeable, "mergeable"}, {k.inOrder, "in order"}, {k.vector, "vectorised"}} {
		if o.on {
			s += ", " + o.name
		}
	}
	return fmt.Sprintf("%s, %d pairs", s, k.pairs)
}

// startPMD starts testpmd with a device.
func startPMD(t *testing.T, ns *netns.NS, vdev string, k pmdKind) *pmd {
	t.Helper()
	exe, err := exec.LookPath("dpdk-testpmd")
	if err != nil {
		vmtest.Lacks(t, "dpdk-testpmd (Debian: apt-get install dpdk-dev)")
	}
	lines, err := exec.LookPath("stdbuf") // what testpmd says comes by lines, not by pages
	if err != nil {
		vmtest.Lacks(t, "stdbuf (Debian: apt-get install coreutils)")
	}
	room := "2176" // of a buffer, in bytes: longer frames take several
	if !k.mergeable {
		room = "9600"
	}
	queues := strconv.Itoa(k.pairs)
	p, dir := &pmd{t: t}, shortDir(t)
	p.cmd = exec.Command(lines, "-oL", exe, "--no-huge", "-m", "256", "--lcores", "(0,1)@"+allowed(t), "--no-pci", "--no-telemetry", "--file-prefix="+filepath.Base(dir),
		"--force-max-simd-bitwidth=512", "--log-level=pmd.net.virtio.*:info", "--vdev", vdev, "--", "--forward-mode=io", "--auto-start", "--nb-cores=1",
		"--rxq="+queues, "--txq="+queues, "--mbuf-size="+room, "--total-num-mbufs=8192", "--no-mlockall", "--no-flush-rx")
	p.cmd.Env = append(os.Environ(), "RUNTIME_DIRECTORY="+dir) // what EAL leaves behind goes with it
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.in, err = p.cmd.StdinPipe(); err == nil {
		err = ns.Start(p.cmd)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("testpmd:\n%s", &p.out)
		}
	})
	return p
}

// allowed is the set of processors that this process may use, in EAL's words.
func allowed(t *testing.T) string {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	var l []string
	for i := 0; len(l) < set.Count(); i++ {
		if set.IsSet(i) {
			l = append(l, strconv.Itoa(i))
		}
	}
	return "(" + strings.Join(l, ",") + ")"
}

// forwards waits until testpmd passes frames on: what comes before, its driver throws away.
func (p *pmd) forwards() {
	p.t.Helper()
	for begin := time.Now(); !strings.Contains(p.out.String(), "Press enter to exit"); time.Sleep(5 * time.Millisecond) {
		if time.Since(begin) > time.Minute {
			p.t.Fatal("testpmd does not begin to pass frames on")
		}
	}
}

func (p *pmd) kill() {
	if !p.ended {
		p.ended = true
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
}

var pmdTotals = regexp.MustCompile(`(?s)Accumulated forward statistics.*?RX-packets: (\d+) +RX-dropped: (\d+).*?TX-packets: (\d+) +TX-dropped: (\d+)`)

// end ends testpmd and checks that it received and sent n frames, and dropped none.
func (p *pmd) end(n int) {
	p.t.Helper()
	p.in.Close()
	err := p.cmd.Wait()
	p.ended = true
	m := pmdTotals.FindStringSubmatch(p.out.String())
	if err != nil || m == nil {
		p.t.Errorf("testpmd ended by %v, and says nothing of its frames", err)
		return
	}
	if want := strconv.Itoa(n); m[1] != want || m[2] != "0" || m[3] != want || m[4] != "0" {
		p.t.Errorf("testpmd received %s frames and dropped %s, sent %s and dropped %s; %d were sent to it, and as many came back", m[1], m[2], m[3], m[4], n)
	}
}

// quiet makes a namespace in which the kernel sends nothing by itself.
func quiet(t *testing.T) *netns.NS {
	t.Helper()
	if netns.NeedsUser() {
		vmtest.Lacks(t, "root (CAP_NET_ADMIN, CAP_SYS_ADMIN)")
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	err = ns.Do(func() error {
		for _, name := range []string{"all", "default"} {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0); err != nil && !os.IsNotExist(err) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

const (
	bounceMTU    = 9000
	bounceFrames = 1500
	bounceWindow = 32
	bouncePorts  = 61 // of UDP: flows, which the interface spreads over its queues
)

// bounceFrame makes frame i: lengths from 64 bytes to an MTU of 9000, every byte another in each.
func bounceFrame(b []byte, i int) []byte {
	n := 64 + i*997%(bounceMTU+14-64+1)
	if i == 1 {
		n = bounceMTU + 14
	}
	b = b[:n]
	copy(b, []byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2})
	binary.BigEndian.PutUint16(b[16:], uint16(n-14))
	binary.BigEndian.PutUint16(b[34:], uint16(1024+i%bouncePorts))
	binary.BigEndian.PutUint16(b[36:], 9)
	binary.BigEndian.PutUint16(b[38:], uint16(n-34))
	binary.BigEndian.PutUint16(b[40:], 0)
	binary.BigEndian.PutUint32(b[42:], uint32(i))
	x := uint32(i)*2654435761 + 1
	for k := 46; k < n; k++ {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[k] = byte(x)
	}
	return b
}

// awake waits until the kernel has taken notice of the carrier of interface bl0: before, which may be a second, it drops what is sent
// without a word.
func awake(t *testing.T, ns *netns.NS) {
	t.Helper()
	err := ns.Do(func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(2 * time.Millisecond) {
			l, err := h.LinkByName("bl0")
			if err != nil {
				return err
			}
			// This waits for the notice that is being taken now.
			if err := h.LinkSetUp(l); err != nil {
				return err
			}
			if l.Attrs().OperState == netlink.OperUp {
				return nil
			}
			if time.Now().After(end) {
				return fmt.Errorf("the kernel does not see the carrier of bl0: %v", l.Attrs().OperState)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// bounce sends bounceFrames frames out by interface bl0 and waits until each has come back, every byte of it the same.
func bounce(t *testing.T, ns *netns.NS) {
	t.Helper()
	awake(t, ns)
	fd := -1
	const proto = unix.ETH_P_IP>>8 | unix.ETH_P_IP&0xff<<8
	err := ns.Do(func() (err error) {
		nif, err := net.InterfaceByName("bl0")
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
			return err
		}
		if err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000}); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: nif.Index})
	})
	defer unix.Close(fd)
	if err != nil {
		t.Fatal(err)
	}
	seen := make([]bool, bounceFrames)
	buf, want := make([]byte, 16384), make([]byte, 16384)
	last := time.Now()
	for sent, got := 0, 0; got < bounceFrames; {
		for ; sent < bounceFrames && sent-got < bounceWindow; sent++ {
			if _, err := unix.Write(fd, bounceFrame(buf, sent)); err != nil {
				t.Fatalf("frame %d of %d bytes: %v", sent, len(bounceFrame(buf, sent)), err)
			}
		}
		n, err := unix.Read(fd, buf)
		switch {
		case err == unix.EAGAIN || err == unix.EINTR:
			if time.Since(last) > 30*time.Second {
				t.Fatalf("%d frames of %d came back, then none for 30 s", got, sent)
			}
			continue
		case err != nil:
			t.Fatal(err)
		case n < 64:
			t.Fatalf("a frame of %d bytes", n)
		}
		i := int(binary.BigEndian.Uint32(buf[42:]))
		if i >= sent || seen[i] {
			t.Fatalf("frame %d came, again or never sent: %x", i, buf[:64])
		}
		if !bytes.Equal(buf[:n], bounceFrame(want, i)) {
			t.Fatalf("frame %d came back changed, as %d bytes", i, n)
		}
		seen[i] = true
		got++
		last = time.Now()
	}
}

// side is one of our programs with a vhost-user socket, in a namespace of its own, and an interface that both sides' frames pass.
type side struct {
	end
	cmd  *exec.Cmd
	args []string
}

func newSide(t *testing.T, name string, args ...string) *side {
	t.Helper()
	s := &side{end: end{t: t, side: name, ns: quiet(t), socket: filepath.Join(shortDir(t), "status"), log: new(logBuffer)}}
	s.args = append([]string{name, "--status", s.socket}, args...)
	s.logOnFailure()
	s.start()
	t.Cleanup(func() {
		if t.Failed() {
			p, err := s.status()
			t.Logf("%+v, %v", p, err)
		}
		s.stop(unix.SIGTERM)
	})
	return s
}

func (s *side) start() {
	s.t.Helper()
	exe, err := programPath()
	if err != nil {
		s.t.Fatal(err)
	}
	s.cmd = exec.Command(exe, s.args...)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.ns.Start(s.cmd); err != nil {
		s.cmd = nil
		s.t.Fatal(err)
	}
}

func (s *side) stop(sig unix.Signal) {
	s.t.Helper()
	if s.cmd == nil {
		return
	}
	s.cmd.Process.Signal(sig)
	if err := s.cmd.Wait(); err != nil && sig != unix.SIGKILL {
		s.t.Errorf("the %s ended badly: %v", s.side, err)
	}
	s.cmd = nil
}

// up waits until frames pass, and checks what was negotiated.
func (s *side) up(k pmdKind) status.Link {
	s.t.Helper()
	l := s.waitState(0, "up, with carrier", time.Minute, func(l status.Link) bool {
		return (l.State == "up" || l.State == "connected") && l.Devices[0].Carrier && l.Devices[0].Pairs == k.pairs
	})
	for _, f := range []struct {
		name string
		want bool
	}{{"ring_packed", k.packed}, {"mrg_rxbuf", k.mergeable}, {"in_order", k.inOrder}, {"mq", k.pairs > 1}} {
		if has(l.Devices[0].Negotiated, f.name) != f.want {
			s.t.Errorf("negotiated %v: %s is not %v", l.Devices[0].Negotiated, f.name, f.want)
		}
	}
	return l
}

// alone waits until the peer has gone.
func (s *side) alone() status.Link {
	s.t.Helper()
	l := s.waitState(0, "without a peer", 20*time.Second, func(l status.Link) bool {
		return l.State != "up" && l.State != "connected" && !l.Devices[0].Carrier
	})
	for _, n := range []string{"failed", "unknown", "queues_broken", "memory_faults", "stuck", "no_acknowledge", "refused", "malformed", "unexpected", "timeouts", "failures", "broken", "rung"} {
		if l.Counters[n] != 0 {
			s.t.Errorf("%s: %d: %v", n, l.Counters[n], l.Counters)
		}
	}
	return l
}

// moved checks what passed between two looks: n frames each way, some by each queue.
func (s *side) moved(before, after status.Link, n int) {
	s.t.Helper()
	was := map[int]uint64{}
	for _, q := range before.Devices[0].Queues {
		was[q.Index] = q.Pump["frames"]
	}
	var sum [2]uint64
	for _, q := range after.Devices[0].Queues {
		if strings.HasPrefix(q.Name, "ctrl") {
			continue
		}
		d := q.Pump["frames"] - was[q.Index]
		if sum[q.Index%2] += d; d == 0 {
			s.t.Errorf("queue %s moved nothing", q.Name)
		}
	}
	if sum[0] != uint64(n) || sum[1] != uint64(n) {
		s.t.Errorf("%d and %d frames passed, want %d each way", sum[0], sum[1], n)
	}
}

func onOff(on bool) string {
	if on {
		return "1"
	}
	return "0"
}

// pmdKinds are all kinds, or some.
func pmdKinds(some []pmdKind, vector bool) []pmdKind {
	if !*fullFlag {
		return some
	}
	var l []pmdKind
	for i := 0; i < 32; i++ {
		k := pmdKind{i&1 != 0, i&2 != 0, i&4 != 0, i&8 != 0, 1 + i>>4*3}
		if !k.vector || vector {
			l = append(l, k)
		}
	}
	return l
}

// TestVhostUserDPDK: DPDK's virtio_user drives our device, over each kind of ring; it ends, is killed, and comes back.
func TestVhostUserDPDK(t *testing.T) {
	for _, k := range pmdKinds([]pmdKind{
		{false, false, false, false, 1}, {false, false, false, true, 1}, {false, true, true, false, 4},
		{true, false, true, true, 1}, {true, true, false, false, 4}, {true, false, false, false, 1},
	}, true) {
		t.Run(k.String(), func(t *testing.T) {
			t.Parallel()
			sock := filepath.Join(shortDir(t), "s")
			s := newSide(t, "host", "--board", fmt.Sprintf("vhost-user:%s,queues=%d", sock, k.pairs), "-i", "bl0", "--mtu", strconv.Itoa(bounceMTU))
			for i := 0; i < *roundFlag; i++ {
				before := s.alone()
				p := startPMD(t, s.ns, k.virtioUser(sock), k)
				s.up(k)
				p.forwards()
				bounce(t, s.ns)
				k.checkVector(t, p)
				if i%2 == 1 {
					p.kill()
				} else {
					p.end(bounceFrames)
				}
				s.moved(before, s.alone(), bounceFrames)
			}
		})
	}
}

// virtioUser is the device of a testpmd that is the driver.
func (k pmdKind) virtioUser(sock string) string {
	return fmt.Sprintf("net_virtio_user0,path=%s,queues=%d,packed_vq=%s,mrg_rxbuf=%s,in_order=%s,vectorized=%s", sock, k.pairs, onOff(k.packed), onOff(k.mergeable),
		onOff(k.inOrder), onOff(k.vector))
}

// checkVector checks that testpmd takes its vectorised path, where its processor has one.
func (k pmdKind) checkVector(t *testing.T, p *pmd) {
	t.Helper()
	if !k.vector || k.mergeable || k.packed != k.inOrder {
		return // DPDK takes another path
	}
	if k.packed {
		if b, _ := os.ReadFile("/proc/cpuinfo"); !bytes.Contains(b, []byte(" avx512f ")) {
			t.Log("this processor has no AVX-512: testpmd takes another path")
			return
		}
	}
	if !regexp.MustCompile(`using (packed ring )?vectorized Rx path`).MatchString(p.out.String()) {
		t.Error("testpmd takes no vectorised path")
	}
}

// TestVhostUserDPDKServer: our device connects to DPDK's virtio_user, which goes on while we end, are killed, and come back.
func TestVhostUserDPDKServer(t *testing.T) {
	for _, k := range []pmdKind{{pairs: 1}, {packed: true, mergeable: true, pairs: 4}} {
		t.Run(k.String(), func(t *testing.T) {
			t.Parallel()
			sock := filepath.Join(shortDir(t), "s")
			p := startPMD(t, quiet(t), k.virtioUser(sock)+",server=1", k)
			s := newSide(t, "host", "--board", fmt.Sprintf("vhost-user:%s,client,queues=%d", sock, k.pairs), "-i", "bl0", "--mtu", strconv.Itoa(bounceMTU))
			s.restarts(p, k)
			p.end(*roundFlag * bounceFrames)
		})
	}
}

// restarts starts our side again and again, after it has ended or was killed, and passes frames each time.
func (s *side) restarts(p *pmd, k pmdKind) {
	s.t.Helper()
	for i := 0; i < *roundFlag; i++ {
		if i > 0 {
			s.stop([]unix.Signal{unix.SIGKILL, unix.SIGTERM}[i%2])
			s.start()
		}
		before := s.up(k)
		p.forwards()
		for _, q := range before.Devices[0].Queues {
			if q.Pump["frames"] != 0 {
				s.t.Errorf("queue %s moved %d frames that nobody sent", q.Name, q.Pump["frames"])
			}
		}
		bounce(s.t, s.ns)
	}
}
