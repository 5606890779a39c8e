//go:build linux

package trial

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// childPlace is the descriptor under which children have the place.
const childPlace = 3

// place is where the sockets of a Rig lie: a file system in memory that is mounted nowhere, and is reached by a
// descriptor. It ends with the last process that has it, however that ends, and leaves nothing behind.
// Abstract names would not do: they belong to a network namespace, and both ends have one of their own.
type place struct {
	root *os.File // nil: dir is a directory
	dir  string   // this process's name of it
}

// newPlace makes a place. Where the kernel has no such mounts (before 5.2) or forbids them, it is a directory for temporary
// files, which stays if this process is killed.
func newPlace() (*place, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err == nil {
		defer unix.Close(fs)
		if err = unix.FsconfigSetString(fs, "mode", "0700"); err == nil {
			err = unix.FsconfigCreate(fs)
		}
	}
	if err == nil {
		var fd int
		if fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC); err == nil {
			return &place{root: os.NewFile(uintptr(fd), "place"), dir: fmt.Sprintf("/proc/self/fd/%d", fd)}, nil
		}
	}
	dir, err := os.MkdirTemp("", "boardlink-")
	if err != nil {
		return nil, err
	}
	return &place{dir: dir}, nil
}

// path returns this process's name of a file in the place.
func (p *place) path(name string) string { return filepath.Join(p.dir, name) }

// childPath returns the name that a child has of a file in the place, once give has given it to the child.
func (p *place) childPath(name string) string {
	if p.root == nil {
		return p.path(name)
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", childPlace, name)
}

// give lets a command that is not started yet have the place.
func (p *place) give(cmd *exec.Cmd) {
	if p.root != nil {
		cmd.ExtraFiles = []*os.File{p.root} // from descriptor childPlace on
	}
}

func (p *place) close() {
	if p.root != nil {
		p.root.Close()
		return
	}
	os.RemoveAll(p.dir)
}
