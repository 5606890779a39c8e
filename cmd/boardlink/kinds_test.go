package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"golang.org/x/sys/unix"
)

// TestKindsOfEveryProgram: each kind of board of docs/ports.md opens with each program, as far as it gets without the
// hardware: what is told is the device that is missing, never the kind.
func TestKindsOfEveryProgram(t *testing.T) {
	netnstest.Need(t)
	t.Parallel()
	b := newBox(t)
	b.own("board.toml")
	kinds, err := trial.DocumentedKinds(filepath.Join("..", ".."), b.dir)
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Dir(b.prog)
	for _, p := range []string{"boardlink-host", "boardlink-agent"} {
		if out, err := exec.Command("go", "build", "-o", filepath.Join(bin, p), "../"+p).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", p, err, out)
		}
	}
	boardlink := b.prog
	for _, k := range kinds {
		for _, side := range []board.Side{board.Host, board.Agent} {
			spec := k.Specs[side]
			for _, prog := range []string{"boardlink", "boardlink-" + side.String()} {
				args := []string{"--status", "none", "--board", spec}
				b.prog = filepath.Join(bin, prog)
				if prog == "boardlink" {
					args = append([]string{side.String()}, args...)
				}
				p := b.start(nil, "", args...)
				b.prog = boardlink
				// It waits for the board, or ends with a line about it.
				until(t, 20*time.Second, prog+" "+spec, func() bool {
					select {
					case <-p.done:
						return true
					default:
						return strings.Contains(p.err.String(), "waiting for the board")
					}
				})
				code := p.end(unix.SIGTERM, 5*time.Second)
				if err := trial.CheckMissing(spec, code, p.err.String()); err != nil {
					t.Errorf("%s %v: %v", prog, side, err)
				}
			}
		}
	}
	if len(kinds) != 4 {
		t.Errorf("docs/ports.md has %d kinds, want 4", len(kinds))
	}
}
