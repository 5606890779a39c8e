package trial_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/ctl"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/tty"
)

var consoleBytes = flag.Int("console-bytes", 8<<20, "bytes that TestConsole sends each way")

// attach attaches to a console as a client of the control socket. The first message is read.
func attach(t *testing.T, r *trial.Rig, req ctl.ConsoleRequest) (*ctl.Conn, net.Conn) {
	t.Helper()
	conn, err := net.Dial("unix", r.StatusSocket(board.Host))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := ctl.NewConn(conn, conn)
	if err := c.SendLine(ctl.Request{Boardlink: ctl.Version, Verb: ctl.VerbConsole, Console: &req}); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(conn)
	var reply ctl.Reply
	if err := c.ReceiveLine(&reply); err != nil || reply.Error != "" {
		t.Fatal(reply, err)
	}
	if m, _, err := c.Receive(nil); err != nil || m.Type != ctl.Attached || m.State == nil || m.State.Name != req.Name {
		t.Fatal(m, err)
	}
	return c, conn
}

// console returns the status of a console at an end.
func console(t *testing.T, r *trial.Rig, s board.Side, name string) (d status.Device) {
	t.Helper()
	for _, d := range getStatus(t, r, s).Links[0].Devices {
		if d.Name == name {
			return d
		}
	}
	t.Fatalf("the %s has no %s", s, name)
	return d
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("%s does not happen", what)
		}
	}
}

// words is words of 8 bytes from first on, which show where they belong.
func words(first, n int) []byte {
	b := make([]byte, 8*n)
	for i := 0; i < n; i++ {
		binary.LittleEndian.PutUint64(b[8*i:], uint64(first+i))
	}
	return b
}

// ascending checks that each word is larger than the one before it, and returns the last one.
func ascending(t *testing.T, b []byte, last int64) int64 {
	t.Helper()
	for ; len(b) >= 8; b = b[8:] {
		w := int64(binary.LittleEndian.Uint64(b))
		if w <= last {
			t.Fatalf("word %d comes after word %d", w, last)
		}
		last = w
	}
	return last
}

// typist is a terminal of the test in which a program runs.
type typist struct {
	t   *testing.T
	pty *tty.Pty
	cmd *exec.Cmd
	mu  sync.Mutex
	all []byte
}

func newTypist(t *testing.T, args ...string) *typist {
	t.Helper()
	p, err := tty.Open()
	if err != nil {
		t.Fatal(err)
	}
	y := &typist{t: t, pty: p}
	if err := p.SetSize(tty.Size{Cols: 90, Rows: 33}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	slave, err := p.OpenSlave() // kept open: the terminal's mode is looked at when the program has ended
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(done)
		b := make([]byte, 4096)
		for {
			n, err := p.Read(b)
			if err != nil {
				return
			}
			y.mu.Lock()
			y.all = append(y.all, b[:n]...)
			y.mu.Unlock()
		}
	}()
	y.cmd = exec.Command(exe, args...)
	y.cmd.Stdin, y.cmd.Stdout, y.cmd.Stderr = slave, slave, slave
	y.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := y.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		y.cmd.Process.Kill() // fails where it has ended
		y.cmd.Wait()
		slave.Close()
		p.Close()
		<-done
	})
	return y
}

func (y *typist) see(text string) {
	y.t.Helper()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		y.mu.Lock()
		i := bytes.Index(y.all, []byte(text))
		if i >= 0 {
			y.all = y.all[i+len(text):]
		}
		rest := string(y.all)
		y.mu.Unlock()
		if i >= 0 {
			return
		}
		if time.Since(begin) > 30*time.Second {
			y.t.Fatalf("%q does not come, but %q", text, rest)
		}
	}
}

func (y *typist) key(text string) {
	y.t.Helper()
	if _, err := y.pty.Write([]byte(text)); err != nil {
		y.t.Fatal(err)
	}
}

// end waits for the program's end, and returns its exit status.
func (y *typist) end() int {
	y.t.Helper()
	done := make(chan error, 1)
	go func() { done <- y.cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		y.t.Fatal("the program does not end")
	}
	return y.cmd.ProcessState.ExitCode()
}

// Consoles beside a network, between programs: a shell for people at terminals, streams both ways, readers that stall, and both ends
// killed in mid-stream.
func TestConsole(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	r := start(t, trial.Config{
		HostArgs: []string{"--console", "name=con0,log=" + in("log"), "--console", "name=con1,scrollback=64K",
			"--console", fmt.Sprintf("name=con2,scrollback=%d", 2**consoleBytes)},
		AgentArgs: []string{"--console", "name=con0,exec=/bin/sh", "--console", "name=con1,pty=" + in("board1"), "--console", "name=con2,pty=" + in("board2")},
	})
	for _, name := range []string{"con0", "con1", "con2"} {
		eventually(t, name, func() bool { return strings.HasSuffix(console(t, r, board.Agent, name).Status, "DRIVER_OK") })
	}
	if d := console(t, r, board.Host, "con1"); d.Number != 65 || d.Type != "console" || fmt.Sprint(d.Negotiated) != "[size event_idx version_1]" {
		t.Errorf("%+v", d)
	}
	sock := r.StatusSocket(board.Host)
	boardEnd := func(name string) *os.File {
		t.Helper()
		var f *os.File
		eventually(t, "the board's terminal", func() (ok bool) {
			var err error
			f, err = os.OpenFile(in(name), os.O_RDWR|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
			return err == nil
		})
		t.Cleanup(func() { f.Close() })
		return f
	}

	t.Run("terminals", func(t *testing.T) {
		one := newTypist(t, "console", "con0", "--status", sock)
		one.see("[boardlink: attached to board0/con0; attached are: ")
		one.key("PS1='$ '\r")
		hasSize := func(want string) { // it comes by another way than keys
			t.Helper()
			eventually(t, want, func() bool {
				one.key("stty size\r")
				time.Sleep(20 * time.Millisecond)
				one.mu.Lock()
				defer one.mu.Unlock()
				return bytes.Contains(one.all, []byte(want+"\r\n"))
			})
		}
		hasSize("33 90")
		if err := one.pty.SetSize(tty.Size{Cols: 132, Rows: 50}); err != nil {
			t.Fatal(err)
		}
		if err := one.cmd.Process.Signal(syscall.SIGWINCH); err != nil { // a shell's children get it from the kernel
			t.Fatal(err)
		}
		hasSize("50 132")
		one.key("echo tw''o~.\r")
		one.see("two~.\r\n")
		one.key("~~ish; cat\r")
		one.see("~ish: not found")
		one.key("ping\r")
		one.see("ping\r\n")
		one.see("ping\r\n") // cat runs
		one.key("\x03")
		one.see("$ ") // a shell drops what was typed while its child is interrupted
		one.key("echo a''wake\r")
		one.see("awake\r\n")

		two := newTypist(t, "console", "board0/con0", "--status", sock)
		two.see("read only: ")
		two.see(" has the keyboard (--take-over takes it)")
		two.see("awake\r\n") // of the scrollback
		two.key("x")
		two.see("what is typed is dropped")
		two.key("\r~!")
		one.see("has taken the keyboard")
		two.key("echo ours n''ow\r")
		two.see("ours now\r\n")
		one.see("ours now\r\n")
		two.key("~#")
		two.see("attached are: *")
		two.key("~?")
		two.see("~. detaches")
		two.key("~.")
		two.see("detached from con0")
		if code := two.end(); code != 0 {
			t.Errorf("exit status %d", code)
		}
		one.key("echo back a''gain\r")
		one.see("back again\r\n")

		three := newTypist(t, "console", "con0", "--status", sock, "--take-over")
		one.see("has taken the keyboard")
		three.key("echo th''ree\r")
		three.see("three\r\n")
		if err := three.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if code := three.end(); code != 128+15 {
			t.Errorf("exit status %d", code)
		}
		for _, y := range []*typist{two, three} { // the terminal is as it was before
			slave, err := y.pty.OpenSlave()
			if err != nil {
				t.Fatal(err)
			}
			out, err := (&exec.Cmd{Path: "/bin/stty", Args: []string{"stty", "-a"}, Stdin: slave}).Output()
			slave.Close()
			modes := strings.Fields(string(out))
			for _, m := range []string{"icanon", "echo", "isig", "opost"} {
				if err != nil || !slices.Contains(modes, m) {
					t.Errorf("%s: %s%v", m, out, err)
				}
			}
		}
	})

	t.Run("pipes", func(t *testing.T) {
		cmd := exec.Command(exe, "console", "con0", "--status", sock, "--take-over")
		cmd.Stdin = strings.NewReader("echo from a pi''pe\r")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		eventually(t, "the log", func() bool {
			out, err := exec.Command(exe, "console", "con0", "--status", sock, "--log").Output()
			if err != nil {
				t.Fatal(err)
			}
			file, err := os.ReadFile(in("log"))
			if err != nil {
				t.Fatal(err)
			}
			return bytes.Contains(out, []byte("from a pipe\r\n")) && bytes.Equal(out, file)
		})
		follow := exec.Command(exe, "console", "con0", "--status", sock, "--log", "-f")
		out, err := follow.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := follow.Start(); err != nil {
			t.Fatal(err)
		}
		defer follow.Wait()
		defer follow.Process.Kill()
		c, conn := attach(t, r, ctl.ConsoleRequest{Name: "con0", TakeOver: true})
		defer conn.Close()
		if err := c.Send(ctl.Message{Type: ctl.Input}, []byte("echo fol''lowed\r")); err != nil {
			t.Fatal(err)
		}
		var got []byte
		for b := make([]byte, 4096); !bytes.Contains(got, []byte("followed\r\n")); {
			n, err := out.Read(b)
			if err != nil {
				t.Fatalf("%q: %v", got, err)
			}
			got = append(got, b[:n]...)
		}
		for args, want := range map[string]string{"con7": "there is no console con7; there are: board0/con0 board0/con1 board0/con2", "no/con0": "there is no console no/con0"} {
			cmd := exec.Command(exe, "console", args, "--status", sock)
			if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), want) || strings.Count(string(out), "\n") != 1 {
				t.Errorf("%s: %d, %s", args, cmd.ProcessState.ExitCode(), out)
			}
		}
		out2, err := exec.Command(exe, "console", "--status", sock).Output()
		if err != nil || !strings.Contains(string(out2), "board0/con1  board up, attached: nobody\n") {
			t.Errorf("%s, %v", out2, err)
		}
	})

	t.Run("key", func(t *testing.T) {
		f := boardEnd("board1")
		go func() {
			b := make([]byte, 64)
			for {
				n, err := f.Read(b)
				if err != nil {
					return
				}
				f.Write(b[:n])
			}
		}()
		c, conn := attach(t, r, ctl.ConsoleRequest{Name: "con1"})
		defer conn.Close()
		var times []time.Duration
		for i := 0; i < 200; i++ {
			begin := time.Now()
			if err := c.Send(ctl.Message{Type: ctl.Input}, []byte{byte(i)}); err != nil {
				t.Fatal(err)
			}
			for {
				m, b, err := c.Receive(nil)
				if err != nil {
					t.Fatal(err)
				}
				if m.Type == ctl.Output {
					if len(b) != 1 || b[0] != byte(i) {
						t.Fatalf("%q comes back", b)
					}
					break
				}
			}
			times = append(times, time.Since(begin))
		}
		sort.Slice(times, func(i, j int) bool { return times[i] < times[j] })
		t.Logf("round trip of a key: p50 %v, p99 %v", times[100], times[198])
		f.Close()
	})

	t.Run("streams", func(t *testing.T) {
		n := *consoleBytes / 8
		want := words(0, n)
		sum := sha256.Sum256(want)
		f := boardEnd("board2")
		type reader struct {
			c    *ctl.Conn
			conn net.Conn
		}
		var readers []reader
		for i := 0; i < 4; i++ {
			c, conn := attach(t, r, ctl.ConsoleRequest{Name: "con2", ReadOnly: true})
			readers = append(readers, reader{c, conn})
		}
		var wg sync.WaitGroup
		begin := time.Now()
		for _, x := range readers {
			wg.Add(1)
			go func() {
				defer wg.Done()
				h := sha256.New()
				for got := 0; got < 8*n; {
					m, b, err := x.c.Receive(nil)
					if err != nil || m.Lost != 0 {
						t.Errorf("%+v, %v", m, err)
						return
					}
					h.Write(b)
					got += len(b)
				}
				if !bytes.Equal(h.Sum(nil), sum[:]) {
					t.Error("a reader got something else")
				}
			}()
		}
		if _, err := f.Write(want); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		t.Logf("%d bytes to the host and four readers in %v: %.1f MB/s", 8*n, time.Since(begin).Round(time.Millisecond), float64(8*n)/1e6/time.Since(begin).Seconds())

		c, conn := attach(t, r, ctl.ConsoleRequest{Name: "con2"})
		defer conn.Close()
		begin = time.Now()
		go func() {
			for p := want; len(p) > 0; {
				k := min(len(p), 16<<10)
				if err := c.Send(ctl.Message{Type: ctl.Input}, p[:k]); err != nil {
					t.Error(err)
					return
				}
				p = p[k:]
			}
		}()
		h := sha256.New()
		if _, err := io.CopyN(h, f, int64(8*n)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(h.Sum(nil), sum[:]) {
			t.Error("the board got something else")
		}
		t.Logf("%d bytes to the board in %v: %.1f MB/s", 8*n, time.Since(begin).Round(time.Millisecond), float64(8*n)/1e6/time.Since(begin).Seconds())
		a, hst := console(t, r, board.Agent, "con2").Counters, console(t, r, board.Host, "con2").Counters
		if a["typed"] != uint64(8*n) || a["typed_lost"] != 0 || a["printed"] != uint64(8*n) || hst["printed"] != uint64(8*n) || hst["typed"] != uint64(8*n) || hst["scrollback_lost"] != 0 {
			t.Errorf("agent %v, host %v", a, hst)
		}
	})

	// One that stalls loses what the scrollback does not keep, and holds up nobody.
	t.Run("stalled", func(t *testing.T) {
		f := boardEnd("board1")
		const n = 4 << 20 / 8
		before := console(t, r, board.Host, "con1").Counters["printed"]
		c, _ := attach(t, r, ctl.ConsoleRequest{Name: "con1", ReadOnly: true})
		want := words(0, n)
		if _, err := f.Write(want); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the board's program", func() bool { return console(t, r, board.Host, "con1").Counters["printed"] == before+8*n })
		at, lost := 0, 0
		for at < 8*n {
			m, b, err := c.Receive(nil)
			if err != nil {
				t.Fatal(err)
			}
			lost, at = lost+int(m.Lost), at+int(m.Lost)
			if at+len(b) > 8*n || !bytes.Equal(b, want[at:at+len(b)]) {
				t.Fatalf("%d bytes behind %d are something else; %d are lost", len(b), at, lost)
			}
			at += len(b)
		}
		if lost == 0 || console(t, r, board.Host, "con1").Counters["scrollback_lost"] != uint64(lost) {
			t.Errorf("%d bytes are lost", lost)
		}
		f.Close()
	})

	t.Run("killed", func(t *testing.T) { testConsoleKilled(t, r, boardEnd) })
}

// dropped is what a console tells of bytes that were printed while there was no link.
var dropped = regexp.MustCompile(`\r\n\[boardlink: \d+ bytes were dropped here while there was no link\]\r\n`)

// testConsoleKilled kills the host while the board prints, then the agent while somebody types: no byte comes twice, and what is missing is
// counted.
func testConsoleKilled(t *testing.T, r *trial.Rig, boardEnd func(string) *os.File) {
	f := boardEnd("board2")
	before := console(t, r, board.Agent, "con2").Counters
	c, _ := attach(t, r, ctl.ConsoleRequest{Name: "con2", ReadOnly: true})
	stop := make(chan struct{})
	written := make(chan int, 1)
	go func() {
		n := 0
		for i := 1; ; i++ {
			select {
			case <-stop:
				written <- n
				return
			case <-time.After(100 * time.Microsecond):
			}
			if _, err := f.Write(words(n/8, 128)); err != nil {
				t.Error(err)
			}
			n += 1024
		}
	}()
	var all []byte
	for len(all) < 64<<10 {
		m, b, err := c.Receive(nil)
		if err != nil || m.Lost != 0 {
			t.Fatal(m, err)
		}
		all = append(all, b...)
	}
	if err := r.Kill(board.Host); err != nil {
		t.Fatal(err)
	}
	for {
		m, b, err := c.Receive(nil)
		if err != nil {
			break
		}
		if m.Lost != 0 {
			t.Fatal(m)
		}
		all = append(all, b...)
	}
	eventually(t, "the loss of the link", func() bool { return !strings.HasSuffix(console(t, r, board.Agent, "con2").Status, "DRIVER_OK") })
	if err := r.StartSide(board.Host); err != nil {
		t.Fatal(err)
	}
	waitUp(t, r)
	eventually(t, "the console", func() bool { return strings.HasSuffix(console(t, r, board.Agent, "con2").Status, "DRIVER_OK") })
	close(stop)
	n := <-written
	sum := func(m map[string]uint64) uint64 {
		return m["printed"] + m["printed_lost"] + m["printed_unsure"] - before["printed"]
	}
	eventually(t, "the end of the stream", func() bool {
		// A note of what is missing is printed, too.
		return sum(console(t, r, board.Agent, "con2").Counters) >= uint64(n)
	})
	a := console(t, r, board.Agent, "con2").Counters
	c, _ = attach(t, r, ctl.ConsoleRequest{Name: "con2", ReadOnly: true, Back: -1})
	h := console(t, r, board.Host, "con2").Counters
	var again []byte
	for uint64(len(again)) < h["printed"] {
		_, b, err := c.Receive(nil)
		if err != nil {
			t.Fatal(err)
		}
		again = append(again, b...)
	}
	notes := 0
	for _, note := range dropped.FindAll(again, -1) {
		notes += len(note)
	}
	again = dropped.ReplaceAll(again, nil)
	last := ascending(t, all, -1)
	again = again[len(again)%8:] // what was dropped may end inside a word
	if end := ascending(t, again, last); end != int64(n/8-1) {
		t.Errorf("the last word is %d, %d were written", end, n/8)
	}
	t.Logf("%d bytes printed: %d reached a host, %d were dropped, %d were in the hands of the one that was killed; %d of notes", n, a["printed"]-before["printed"], a["printed_lost"], a["printed_unsure"], notes)
	if got := sum(a); got != uint64(n+notes) || (notes > 0) != (a["printed_lost"] > 0) {
		t.Errorf("%d bytes are accounted for, %d were written, notes have %d: %v", got, n, notes, a)
	}

	// Now the agent, while somebody types.
	c, conn := attach(t, r, ctl.ConsoleRequest{Name: "con2", TakeOver: true})
	hb := console(t, r, board.Host, "con2").Counters
	sent := make(chan int, 1)
	stop = make(chan struct{})
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				sent <- n
				return
			case <-time.After(100 * time.Microsecond):
			}
			if err := c.Send(ctl.Message{Type: ctl.Input}, words(n/8, 128)); err != nil {
				t.Error(err)
			}
			n += 1024
		}
	}()
	go func() { // nothing is to wait for this terminal
		for {
			if _, _, err := c.Receive(nil); err != nil {
				return
			}
		}
	}()
	read := func(f *os.File, least int) (got []byte) {
		b := make([]byte, 4096)
		for {
			f.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			k, err := f.Read(b)
			got = append(got, b[:k]...)
			if err != nil && len(got) >= least {
				return got
			}
			if err != nil && !os.IsTimeout(err) {
				t.Fatalf("%d bytes: %v", len(got), err)
			}
			if least > 0 && len(got) >= least && len(got)%8 == 0 {
				return got
			}
		}
	}
	first := read(f, 64<<10)
	if err := r.Kill(board.Agent); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := r.StartSide(board.Agent); err != nil {
		t.Fatal(err)
	}
	waitUp(t, r)
	f = boardEnd("board2")
	second := read(f, 64<<10)
	close(stop)
	total := <-sent
	if err := c.Send(ctl.Message{Type: ctl.Finish}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the last key", func() bool {
		h := console(t, r, board.Host, "con2").Counters
		return h["typed"]+h["typed_lost"]-hb["typed"] == uint64(total) && h["typed_waiting"] == 0
	})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for last := total/8 - 1; ctx.Err() == nil && int(binary.LittleEndian.Uint64(second[len(second)&^7-8:])) != last; {
		second = append(second, read(f, 0)...)
	}
	lastWord := ascending(t, first[:len(first)&^7], -1)
	if end := ascending(t, second[:len(second)&^7], lastWord); end != int64(total/8-1) {
		t.Errorf("the last word is %d, %d were typed", end, total/8)
	}
	hc := console(t, r, board.Host, "con2").Counters
	t.Logf("%d bytes typed: %d given, %d lost in the board's hands; %d+%d read on the board", total, hc["typed"]-hb["typed"], hc["typed_lost"], len(first), len(second))
	conn.Close()
}
