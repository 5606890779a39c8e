// Package evfd is eventfds as interrupts use them: the kernel rings, the program acknowledges.
//
// In the room: the descriptor. Never in it: who wired it to what.
package evfd

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FD is an eventfd, non-blocking and closed on exec. It must not be used beside or after Close.
type FD int

// New makes one with nothing pending.
func New() (FD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("pci: eventfd: %w", err)
	}
	return FD(fd), nil
}

// Ack takes what is pending and returns its number, 0 for nothing.
func (e FD) Ack() (uint64, error) {
	var count uint64
	for {
		// Not unix.Read: its slice would escape.
		n, _, err := unix.Syscall(unix.SYS_READ, uintptr(e), uintptr(unsafe.Pointer(&count)), 8)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return 0, nil
		case err != 0:
			return 0, fmt.Errorf("pci: read of eventfd %d: %w", int(e), err)
		case n != 8:
			return 0, fmt.Errorf("pci: read of eventfd %d gave %d bytes of 8", int(e), n)
		default:
			return count, nil
		}
	}
}

// Ring adds 1.
func (e FD) Ring() error {
	one := uint64(1)
	for {
		_, _, err := unix.Syscall(unix.SYS_WRITE, uintptr(e), uintptr(unsafe.Pointer(&one)), 8)
		switch err {
		case 0, unix.EAGAIN: // full is rung
			return nil
		case unix.EINTR:
		default:
			return fmt.Errorf("pci: write to eventfd %d: %w", int(e), err)
		}
	}
}

// Close gives the descriptor back.
func (e FD) Close() { unix.Close(int(e)) }
