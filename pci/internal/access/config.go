// Package access is what pci/vfio and pci/uio share: mapping BARs and taking the mappings back,
// configuration space through a file, and looking after a function that may vanish.
//
// In the room: memory maps, files, one watching goroutine a function. Never in it: ioctls of VFIO, UIO's files.
package access

import (
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/pci"
)

// Config is a configuration space that stands at an offset of a file.
type Config struct {
	Addr pci.Address
	FD   int
	Off  int64  // in the file
	Size uint64 // bytes

	mu sync.Mutex // between reading the command register and writing it
}

func (c *Config) want(off, width int) error {
	if width != 1 && width != 2 && width != 4 || off < 0 || off%width != 0 || uint64(off)+uint64(width) > c.Size {
		return &pci.Error{Problem: pci.Other, Spec: c.Addr.String(), Reason: fmt.Sprintf("its configuration space of %#x bytes has no %d bytes at %#x", c.Size, width, off)}
	}
	return nil
}

// Read returns width bytes at off as a number. The file is little-endian, as the bus is.
func (c *Config) Read(off, width int) (uint32, error) {
	if err := c.want(off, width); err != nil {
		return 0, err
	}
	var b [4]byte
	for {
		n, err := unix.Pread(c.FD, b[:width], c.Off+int64(off))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n != width {
			return 0xffffffff >> uint(32-8*width), c.failed("read", off, n, err)
		}
		return binary.LittleEndian.Uint32(b[:]), nil
	}
}

// Write writes width bytes at off.
func (c *Config) Write(off, width int, v uint32) error {
	if err := c.want(off, width); err != nil {
		return err
	}
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	for {
		n, err := unix.Pwrite(c.FD, b[:width], c.Off+int64(off))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n != width {
			return c.failed("written", off, n, err)
		}
		return nil
	}
}

// failed is an access that did not happen.
func (c *Config) failed(what string, off, n int, err error) error {
	e := &pci.Error{Problem: pci.Other, Spec: c.Addr.String(), Reason: fmt.Sprintf("its configuration space at %#x cannot be %s", off, what), Err: err}
	switch err {
	case nil:
		e.Reason += fmt.Sprintf(" (%d bytes)", n)
	case unix.ENODEV, unix.ENXIO:
		e.Problem = pci.Gone
	case unix.EPERM, unix.EACCES:
		e.Problem, e.Mend = pci.Permission, "run it as root"
	}
	return e
}

// SetCommand sets and clears bits of the command register.
func (c *Config) SetCommand(set, clear uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, err := c.Read(pci.RegCommand, 2)
	if err != nil {
		return err
	}
	if w := v&^clear | set; w != v {
		return c.Write(pci.RegCommand, 2, w)
	}
	return nil
}
