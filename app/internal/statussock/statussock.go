// Package statussock says where the status sockets of running programs lie, and makes them: in a directory
// that nobody else can write, with no moment in which two programs have one path.
//
// In the room: directories, their checks, the listening socket. Never in it: what is said on the socket.
package statussock

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	rootDir = "/run/boardlink" // root's
	userDir = "/run/user"      // UID/boardlink below it is a user's, where systemd made UID
	tmpName = "boardlink-"     // with the user's number: a user's where there is no runtime directory
	maxPath = 107              // sun_path of unix(7) less its zero byte
)

// Dir returns where this user's programs put their sockets: /run/boardlink for root, the user's
// runtime directory otherwise, and without one a directory in the one for temporary files.
func Dir() string {
	if os.Geteuid() == 0 {
		return rootDir
	}
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Join(d, "boardlink")
	}
	return filepath.Join(os.TempDir(), tmpName+strconv.Itoa(os.Geteuid()))
}

// Prepare makes Dir, and checks it. With an error it is not to be used.
func Prepare() error {
	dir := Dir()
	mode := os.FileMode(0o700)
	if dir == rootDir {
		mode = 0o755
	}
	if err := os.Mkdir(dir, mode); err != nil && !os.IsExist(err) {
		return fmt.Errorf("directory of the status sockets: %w", err)
	}
	return Check(dir, os.Geteuid())
}

// Check refuses a directory of sockets that is a symbolic link, belongs to another user than uid, or that
// others can write; one of those that have a user's number in the directory for temporary files,
// where everybody can make them, must be closed to others altogether. What anybody can put there is
// not taken for a program of that user's.
func Check(dir string, uid int) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	perm := st.Mode & 0o777
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return fmt.Errorf("%s is a symbolic link: not used; remove it", dir)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is not a directory: not used; remove it", dir)
	case int(st.Uid) != uid:
		return fmt.Errorf("%s belongs to user %d, not to user %d: not used; choose another place with --status", dir, st.Uid, uid)
	case perm&0o022 != 0, strings.HasPrefix(filepath.Base(dir), tmpName) && perm&0o077 != 0:
		return fmt.Errorf("%s has mode %04o, so that others can use it: not used; chmod 0700 %s", dir, perm, dir)
	}
	return nil
}

// Find returns the sockets in the directories that this user's programs use, and in those of others
// as far as this user may look there: root's for a user, every user's for root. notes tell, a line
// each, what was left out and why.
func Find() (paths, notes []string) {
	me := os.Geteuid()
	type place struct {
		dir string
		uid int
	}
	places := []place{{Dir(), me}}
	if me == 0 {
		for _, pattern := range []string{filepath.Join(userDir, "*", "boardlink"), filepath.Join(os.TempDir(), tmpName+"*")} {
			dirs, _ := filepath.Glob(pattern)
			for _, d := range dirs {
				name := strings.TrimPrefix(filepath.Base(d), tmpName)
				if filepath.Base(d) == "boardlink" {
					name = filepath.Base(filepath.Dir(d))
				}
				if uid, err := strconv.Atoi(name); err == nil {
					places = append(places, place{d, uid})
				}
			}
		}
	} else {
		places = append(places, place{filepath.Join(userDir, strconv.Itoa(me), "boardlink"), me},
			place{filepath.Join(os.TempDir(), tmpName+strconv.Itoa(me)), me}, place{rootDir, 0})
	}
	seen := map[string]bool{}
	for _, p := range places {
		if seen[p.dir] {
			continue
		}
		seen[p.dir] = true
		err := Check(p.dir, p.uid)
		if err == nil {
			var es []os.DirEntry
			if es, err = os.ReadDir(p.dir); err == nil {
				for _, e := range es {
					if e.Type()&os.ModeSocket != 0 && strings.HasSuffix(e.Name(), ".sock") {
						paths = append(paths, filepath.Join(p.dir, e.Name()))
					}
				}
			}
		}
		if errors.Is(err, os.ErrPermission) {
			notes = append(notes, fmt.Sprintf("%s: permission denied: ask as user %d, or as root", p.dir, p.uid))
		} else if err != nil && !errors.Is(err, os.ErrNotExist) {
			notes = append(notes, err.Error())
		}
	}
	sort.Strings(paths)
	return paths, notes
}

// ErrTaken: a live program serves the path already.
var ErrTaken = errors.New("another program serves this status socket")

// Listener is a listening socket. Close removes it.
type Listener struct {
	*net.UnixListener
	path string
	st   unix.Stat_t
}

// Listen makes a socket at path, mode 0600. A socket that nobody listens on is replaced. It is made
// under another name, and moved to path when it is complete, under a lock of the directory (flock):
// programs that start at once do not take each other's for a dead one's.
func Listen(path string) (*Listener, error) {
	l, err := ListenAt(path)
	if err != nil {
		return nil, fmt.Errorf("status socket %w; choose another with --status", err)
	}
	return l, nil
}

// ListenAt is Listen for a socket of another kind.
func ListenAt(path string) (*Listener, error) {
	fail := func(err error) (*Listener, error) { return nil, fmt.Errorf("%s: %w", path, err) }
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "./"
	}
	var r [4]byte
	if _, err := unix.Getrandom(r[:], 0); err != nil {
		return fail(err)
	}
	tmp := fmt.Sprintf("%s.bl%x", dir, r)
	if len(path) > maxPath || len(tmp) > maxPath {
		return fail(fmt.Errorf("the path has %d bytes; a unix socket's has at most %d, with a name of at least 11 in its directory", len(path), maxPath))
	}
	if base == "" {
		return fail(errors.New("it is a directory"))
	}
	d, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(fmt.Errorf("opening its directory: %w", err))
	}
	defer unix.Close(d)
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(d, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || err != unix.EWOULDBLOCK && err != unix.EINTR {
			break // a file system without flock has to do without
		}
		if time.Now().After(end) {
			return fail(errors.New("its directory is locked by another program (flock)"))
		}
	}
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode()&os.ModeSocket == 0 {
			return fail(errors.New("exists and is not a socket"))
		}
		c, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			c.Close()
			return fail(fmt.Errorf("%w (of the same --name?)", ErrTaken))
		}
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) {
			return fail(fmt.Errorf("it is in use: %w", err))
		}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fail(err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close() // FileListener makes a duplicate
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: tmp}); err != nil {
		return fail(err)
	}
	l := &Listener{path: path}
	err = unix.Chmod(tmp, 0o600)
	if err == nil {
		err = unix.Listen(fd, 128)
	}
	if err == nil {
		err = unix.Lstat(tmp, &l.st)
	}
	var nl net.Listener
	if err == nil {
		nl, err = net.FileListener(f)
	}
	if err == nil {
		if err = unix.Rename(tmp, path); err != nil {
			nl.Close()
		}
	}
	if err != nil {
		_ = unix.Unlink(tmp)
		return fail(err)
	}
	l.UnixListener = nl.(*net.UnixListener)
	l.SetUnlinkOnClose(false)
	return l, nil
}

// Close stops listening and removes the socket, unless it has been replaced.
func (l *Listener) Close() error {
	var st unix.Stat_t
	if unix.Lstat(l.path, &st) == nil && st.Dev == l.st.Dev && st.Ino == l.st.Ino {
		_ = unix.Unlink(l.path)
	}
	return l.UnixListener.Close()
}
