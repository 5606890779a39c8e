//go:build linux

package ports_test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/hwtest/ports"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
)

// TestKindsByGccgo: the lean programs that gccgo compiled, the same files as TestCross uses, open each kind of board of docs/ports.md:
// what they tell of is the device that is missing, never the kind.
func TestKindsByGccgo(t *testing.T) {
	netnstest.Need(t)
	kinds, err := trial.DocumentedKinds(root, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if len(kinds) != 4 {
		t.Errorf("docs/ports.md has %d kinds, want 4", len(kinds))
	}
	done := map[string]bool{}
	for _, m := range ports.Targets {
		if m.Triple == "" || done[m.Arch] {
			continue
		}
		done[m.Arch] = true
		for _, side := range []board.Side{board.Host, board.Agent} {
			t.Run(m.Name+" "+side.String(), func(t *testing.T) {
				words := command(t, m, side)
				t.Parallel()
				for _, k := range kinds {
					t.Run(k.Name, func(t *testing.T) {
						t.Parallel()
						openMissing(t, words, k.Specs[side])
					})
				}
			})
		}
	}
	if len(done) != 2 {
		t.Errorf("gccgo compiles for %v, want two kinds of processor", done)
	}
}

// buffer is a program's standard error.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// openMissing lets a program open a board that does not exist. It waits for the board, or ends with a line about it.
func openMissing(t *testing.T, words []string, spec string) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var stderr buffer
	cmd := exec.Command(words[0], append(words[1:len(words):len(words)], "--status", "none", "--board", spec)...)
	cmd.Env = append(os.Environ(), "BOARDLINK_MACHINE_ID=test")
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // its status is asked for below
	}()
	limit := time.After(upTime)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for signalled := false; ; {
		select {
		case <-ended:
			if err := trial.CheckMissing(spec, cmd.ProcessState.ExitCode(), stderr.String()); err != nil {
				t.Error(err)
			}
			return
		case <-limit:
			t.Errorf("it neither waits for the board nor ends within %v: %s", upTime, stderr.String())
			_ = cmd.Process.Kill() // it may have ended just now
			<-ended
			return
		case <-tick.C:
			if !signalled && strings.Contains(stderr.String(), "waiting for the board") {
				signalled = true
				_ = cmd.Process.Signal(syscall.SIGTERM)
			}
		}
	}
}
