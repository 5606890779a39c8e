package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/bench/netbench"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
)

// TestBenchNet: the figures that scripts read, the table, what is refused.
func TestBenchNet(t *testing.T) {
	netnstest.Need(t)
	b := newBox(t)
	save := filepath.Join(t.TempDir(), "x.json")
	few := []string{"bench", "net", "--mtu", "1500", "--rounds", "2", "--duration", "10ms", "--streams", "1", "--only", "^tcp board|^ping flood", "--paths", "one-process,boardlink,w",
		"--also", "w,placement=window,ring=packed,busy-poll=off,agent=--queue-size=64", "--save", save}
	st, out, errs := b.run("", few...)
	if st != 0 || errs != "" {
		t.Fatalf("status %d: %s\n%s", st, errs, out)
	}
	for _, want := range []string{"MTU 1500", "one process", "w of one process", "tcp board to host", "ping flood: p50", "0 pings lost"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in the table:\n%s", want, out)
		}
	}
	saved, err := os.ReadFile(save)
	if err != nil {
		t.Fatal(err)
	}
	var r netbench.Result
	if err := json.Unmarshal(saved, &r); err != nil {
		t.Fatal(err)
	}
	f := r.Figure(1500, "tcp board to host")
	if f == nil || len(f.Paths) != 3 || len(f.OfOne["w"].Rounds) != 2 || f.OfOne["boardlink"].Median <= 0 || r.Environment == nil || r.Environment.Kernel == "" {
		t.Errorf("%+v, %+v", f, r)
	}
	for _, bad := range [][]string{
		{"--mtu", "100"}, {"--rounds", "0"}, {"--duration", "1ms"}, {"--streams", "0"}, {"--streams", "1,1"}, {"--paths", "x"}, {"--paths", "veth,veth"},
		{"--only", "("}, {"--only", "^x"}, {"--window", "17"}, {"--busy-poll", "x"}, {"--cpu", "0"}, {"--queues", "0"},
		{"--also", "veth"}, {"--also", "x,y"}, {"--also", "x,y=1"}, {"--also", "a=b"}, {"--also", "boardlink"}, {"--host-arg=--no-such-flag", "--paths", "boardlink", "--duration", "10ms"},
	} {
		st, out, errs := b.run("", append([]string{"bench", "net"}, bad...)...)
		if st != exitUsage || out != "" || strings.Count(strings.TrimSpace(errs), "\n") != 0 || errs == "" {
			t.Errorf("%v: status %d, %q, %q", bad, st, out, errs)
		}
	}
}

// TestBenchNetInterrupted: nothing is left behind.
func TestBenchNetInterrupted(t *testing.T) {
	netnstest.Need(t)
	dir := t.TempDir()
	cmd := exec.Command(exe, "bench", "net", "--duration", "1h", "--only", "^tcp", "--paths", "boardlink,two-processes")
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); len(processesOf(dir, "agent")) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("boardlink's ends do not start")
			break
		}
	}
	cmd.Process.Signal(syscall.SIGINT)
	err := cmd.Wait()
	if st := cmd.ProcessState.ExitCode(); st != exitFail {
		t.Errorf("status %d, %v", st, err)
	}
	if l, _ := os.ReadDir(dir); len(l) != 0 {
		t.Errorf("%v is left", l)
	}
	for _, p := range processesOf(dir, "") {
		t.Errorf("process %s is left", p)
	}
}

// processesOf returns the processes that run with TMPDIR=dir, with the word among their arguments unless it is empty.
func processesOf(dir, word string) (pids []string) {
	ps, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range ps {
		env, _ := os.ReadFile(filepath.Join(p, "environ"))
		args, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		if strings.Contains(string(env), "TMPDIR="+dir) && (word == "" || strings.Contains(string(args), "\x00"+word+"\x00")) {
			pids = append(pids, filepath.Base(p))
		}
	}
	return pids
}
