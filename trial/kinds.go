//go:build linux

package trial

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/boardlink/boardlink/board"
)

// Kind is a kind of board as docs/ports.md lists it.
type Kind struct {
	Name  string    // "mpc83xx"
	Specs [2]string // by board.Side; of devices that no machine has
}

// DocumentedKinds reads the kinds of board that docs/ports.md, below root, promises for each program. The devices of
// their specs exist nowhere: the addresses of the document are replaced by others, loopback's socket by one in dir that nobody
// serves, and the description by a copy of one of the samples, which is written into dir.
func DocumentedKinds(root, dir string) ([]Kind, error) {
	sample, err := os.ReadFile(filepath.Join(root, "cmd", "boardlink", "samples", "polled.toml"))
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "board.toml")
	if err := os.WriteFile(file, sample, 0o600); err != nil {
		return nil, err
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "ports.md"))
	if err != nil {
		return nil, err
	}
	missing := strings.NewReplacer("`", "", " ", "", "board.toml", file, "/run/a.sock", filepath.Join(dir, "none"),
		"0000:00:04.0", "ffff:00:04.0", "0000:01:00.0", "ffff:01:00.0", "irq=/dev/uio0", "irq=/dev/uio99")
	var kinds []Kind
	for _, line := range strings.Split(string(doc), "\n") {
		f := strings.Split(line, "|") // | kind | on the carrier | on the board |
		if len(f) != 5 {
			continue
		}
		k := Kind{Name: strings.TrimSpace(f[1])}
		if !strings.HasPrefix(strings.TrimSpace(f[2]), "`"+k.Name+":") {
			continue
		}
		k.Specs[board.Host], k.Specs[board.Agent] = missing.Replace(f[2]), missing.Replace(f[3])
		kinds = append(kinds, k)
	}
	if len(kinds) == 0 {
		return nil, fmt.Errorf("docs/ports.md lists no kind of board")
	}
	return kinds, nil
}

// CheckMissing says what is wrong with how a program ended that was to open the board of spec, which does not exist: its
// exit status and its standard error. It is to name the missing board, whatever the kind, and never to miss the kind.
func CheckMissing(spec string, code int, stderr string) error {
	if code != 0 && code != 2 || strings.Contains(stderr, "no kind of board") || strings.Contains(stderr, "kinds of board are") || !strings.Contains(stderr, spec) {
		return fmt.Errorf("--board %s, which does not exist: exit status %d, want 0 or 2, and a line about %s: %s", spec, code, spec, stderr)
	}
	return nil
}
