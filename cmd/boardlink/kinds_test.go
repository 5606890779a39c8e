package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKindsOfEveryProgram: each kind of board of docs/ports.md opens with each program, as far as it gets without the
// hardware: what is told is the device that is missing, never the kind.
func TestKindsOfEveryProgram(t *testing.T) {
	needRoot(t)
	t.Parallel()
	b := newBox(t)
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "ports.md"))
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Dir(b.prog)
	for _, p := range []string{"boardlink-host", "boardlink-agent"} {
		if out, err := exec.Command("go", "build", "-o", filepath.Join(bin, p), "../"+p).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", p, err, out)
		}
	}
	file := b.own("board.toml")
	sample, err := samples.ReadFile("samples/polled.toml")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, sample, 0o600); err != nil {
		t.Fatal(err)
	}
	kinds := 0
	boardlink := b.prog
	for _, line := range strings.Split(string(doc), "\n") {
		f := strings.Split(line, "|")
		if len(f) != 5 || !strings.Contains(f[2], ":") || !strings.HasPrefix(strings.TrimSpace(f[2]), "`"+strings.TrimSpace(f[1])+":") {
			continue
		}
		kinds++
		for i, side := range []string{"host", "agent"} {
			// Addresses that no machine has.
			spec := strings.NewReplacer("`", "", " ", "", "board.toml", file, "/run/a.sock", b.path("none"), "0000:00:04.0", "ffff:00:04.0", "0000:01:00.0", "ffff:01:00.0",
				"irq=/dev/uio0", "irq=/dev/uio99").Replace(f[2+i])
			for _, prog := range []string{"boardlink", "boardlink-" + side} {
				args := []string{"--status", "none", "--board", spec}
				b.prog = filepath.Join(bin, prog)
				if prog == "boardlink" {
					args = append([]string{side}, args...)
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
				said := p.err.String()
				if code != 0 && code != exitUsage || strings.Contains(said, "no kind of board") || strings.Contains(said, "kinds of board are") || !strings.Contains(said, spec) {
					t.Errorf("%s %s %s: status %d: %s", prog, side, spec, code, said)
				}
			}
		}
	}
	if kinds != 4 {
		t.Errorf("docs/ports.md has %d kinds, want 4", kinds)
	}
}
