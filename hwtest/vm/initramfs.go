package vm

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strings"
)

// archive writes an initramfs: a cpio archive of the "newc" format (cpio(5); Linux's
// Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	w    *bufio.Writer
	n    int64
	ino  uint32
	dirs map[string]bool
	err  error
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), dirs: map[string]bool{"": true, ".": true}}
}

func (a *archive) write(b []byte) {
	if a.err != nil {
		return
	}
	n, err := a.w.Write(b)
	a.n += int64(n)
	a.err = err
}

// pad fills up to a multiple of 4.
func (a *archive) pad() {
	if n := int(-a.n & 3); n > 0 {
		a.write(make([]byte, n))
	}
}

// Types of a file, as in its mode (inode(7)).
const (
	typeFile = 0o100000
	typeDir  = 0o040000
	typeChar = 0o020000
)

// head writes an entry up to its content.
func (a *archive) head(name string, mode uint32, size int64, major, minor uint32) {
	if size > 1<<32-1 && a.err == nil {
		a.err = fmt.Errorf("initramfs: %s has %d bytes: the format ends at 4 GiB", name, size)
	}
	a.ino++
	a.write([]byte("070701"))
	for _, v := range []uint32{a.ino, mode, 0, 0, 1, 0, uint32(size), 0, 0, major, minor, uint32(len(name) + 1), 0} {
		a.write([]byte(fmt.Sprintf("%08X", v)))
	}
	a.write(append([]byte(name), 0))
	a.pad()
}

// dir adds a directory and those above it.
func (a *archive) dir(name string) {
	name = strings.Trim(path.Clean(name), "/")
	if a.dirs[name] {
		return
	}
	a.dir(path.Dir(name))
	a.dirs[name] = true
	a.head(name, typeDir|0o755, 0, 0, 0)
}

// char adds a character device.
func (a *archive) char(name string, perm, major, minor uint32) {
	name = strings.Trim(path.Clean(name), "/")
	a.dir(path.Dir(name))
	a.head(name, typeChar|perm, 0, major, minor)
}

// bytes adds a file.
func (a *archive) bytes(name string, perm uint32, content []byte) {
	name = strings.Trim(path.Clean(name), "/")
	a.dir(path.Dir(name))
	a.head(name, typeFile|perm, int64(len(content)), 0, 0)
	a.write(content)
	a.pad()
}

// file adds a copy of a file of this system.
func (a *archive) file(name, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("initramfs: %s is no file", from)
	}
	name = strings.Trim(path.Clean(name), "/")
	a.dir(path.Dir(name))
	a.head(name, typeFile|uint32(st.Mode().Perm()), st.Size(), 0, 0)
	if a.err != nil {
		return a.err
	}
	n, err := io.Copy(a.w, io.LimitReader(f, st.Size()))
	a.n += n
	if err == nil && n != st.Size() {
		err = io.ErrUnexpectedEOF // it shrank
	}
	if err != nil {
		return fmt.Errorf("initramfs: %s: %w", from, err)
	}
	a.pad()
	return a.err
}

// close writes the end.
func (a *archive) close() error {
	a.head("TRAILER!!!", 0, 0, 0, 0)
	if a.err != nil {
		return a.err
	}
	return a.w.Flush()
}

// sortedKeys makes an archive the same for the same content.
func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
