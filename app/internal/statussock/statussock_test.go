package statussock

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// TestCheck: which directories are taken for a user's own.
func TestCheck(t *testing.T) {
	me := os.Geteuid()
	for _, c := range []struct {
		name, base string
		mode       os.FileMode
		uid        int
		make       func(path string) error
		want       string // "": it is taken
	}{
		{name: "own", base: "boardlink", mode: 0o755, uid: me},
		{name: "own, closed", base: "boardlink-7", mode: 0o700, uid: me},
		{name: "own, open to a look, for temporary files", base: "boardlink-7", mode: 0o755, uid: me, want: "mode 0755"},
		{name: "for everybody", base: "boardlink", mode: 0o777, uid: me, want: "mode 0777"},
		{name: "for everybody, sticky", base: "boardlink", mode: 0o777 | os.ModeSticky, uid: me, want: "mode 0777"},
		{name: "for a group", base: "boardlink", mode: 0o770, uid: me, want: "mode 0770"},
		{name: "of another", base: "boardlink-7", mode: 0o700, uid: me + 1, want: fmt.Sprintf("belongs to user %d, not to user %d", me, me+1)},
		{name: "symbolic link", base: "boardlink", uid: me, want: "symbolic link", make: func(p string) error {
			if err := os.Mkdir(p+".real", 0o700); err != nil {
				return err
			}
			return os.Symlink(p+".real", p)
		}},
		{name: "file", base: "boardlink", uid: me, want: "not a directory", make: func(p string) error { return os.WriteFile(p, nil, 0o600) }},
		{name: "nothing", base: "boardlink", uid: me, want: "no such file", make: func(string) error { return nil }},
	} {
		path := filepath.Join(t.TempDir(), c.base)
		var err error
		if c.make != nil {
			err = c.make(path)
		} else if err = os.Mkdir(path, 0o700); err == nil {
			err = os.Chmod(path, c.mode)
		}
		if err != nil {
			t.Fatal(err)
		}
		err = Check(path, c.uid)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// TestListen: of programs that find a dead one's socket at the same time one gets the path, and nobody
// loses what it has.
func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.sock")
	for round := 0; round < 20; round++ {
		old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		old.SetUnlinkOnClose(false)
		old.Close()
		var wg sync.WaitGroup
		var won uint64
		ls := make([]*Listener, 6)
		for i := range ls {
			wg.Go(func() {
				l, err := Listen(path)
				if err == nil {
					atomic.AddUint64(&won, 1)
				} else if !errors.Is(err, ErrTaken) {
					t.Error(err)
				}
				ls[i] = l
			})
		}
		wg.Wait()
		if won != 1 {
			t.Fatalf("%d programs have the path", won)
		}
		if fi, err := os.Lstat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
			t.Errorf("%v, %v", fi.Mode(), err)
		}
		if c, err := net.Dial("unix", path); err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
		for _, l := range ls {
			if l != nil {
				l.Close()
			}
		}
		if es, err := os.ReadDir(dir); err != nil || len(es) != 0 {
			t.Fatalf("left behind: %v, %v", es, err)
		}
	}
	// A socket that took the place of ours stays.
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(path)
	other, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Error("another program's socket was removed")
	}
	other.Close()
}
