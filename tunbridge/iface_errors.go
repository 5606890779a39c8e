package tunbridge

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// UserError is an error that the user's input or machine set-up caused, not the program: one
// line that says what to do. A program ends with status 2 on it.
type UserError interface {
	error
	UserError() bool
}

// ConfigError is a UserError about an interface.
type ConfigError struct {
	Name string // of the interface; may be empty
	Msg  string // what is wrong and what to do about it, in one line
	Err  error  // the cause, an errno as a rule; may be nil
}

func configError(name string, cause error, format string, args ...interface{}) error {
	return &ConfigError{Name: name, Msg: fmt.Sprintf(format, args...), Err: cause}
}

// Error returns the line.
func (e *ConfigError) Error() string {
	s := "interface"
	if e.Name != "" {
		s = fmt.Sprintf("interface %q", e.Name)
	}
	s += ": " + e.Msg
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *ConfigError) Unwrap() error { return e.Err }

// UserError returns true.
func (e *ConfigError) UserError() bool { return true }

// ioSentinel is an error of the data path. They are made once, so that reporting one
// allocates nothing.
type ioSentinel struct {
	msg  string
	drop bool
}

func (e *ioSentinel) Error() string { return e.msg }

// Unwrap makes errors.Is(err, ErrDropped) hold for what lost one frame.
func (e *ioSentinel) Unwrap() error {
	if e.drop {
		return ErrDropped
	}
	return nil
}

// ErrDropped is behind ErrDown, ErrNoMemory and ErrMalformed: one frame is lost and nothing
// else. The caller counts it and goes on.
var ErrDropped = errors.New("tunbridge: frame dropped")

// What Read, ReadV, Write and WriteV return, to compare with ==.
var (
	// ErrAgain: no frame is there, or no room for one. Wait for the descriptor.
	ErrAgain error = &ioSentinel{"tunbridge: no frame to read, or no room to write one", false}
	// ErrDown: the interface is down, the frame is lost (EIO).
	ErrDown error = &ioSentinel{"tunbridge: the interface is down: frame dropped", true}
	// ErrNoMemory: the kernel had no memory for the frame, it is lost (ENOBUFS, ENOMEM).
	ErrNoMemory error = &ioSentinel{"tunbridge: the kernel is out of memory: frame dropped", true}
	// ErrMalformed: the kernel refuses the frame or its header as malformed; the frame is lost (EINVAL of a
	// write, EMSGSIZE).
	ErrMalformed error = &ioSentinel{"tunbridge: malformed frame or header: frame dropped", true}
	// ErrBuffers: the kernel refuses the buffers of a read: none, more than 1024, or less than the header
	// takes (EINVAL). The next read would fail as well.
	ErrBuffers error = &ioSentinel{"tunbridge: the kernel refuses the buffers of a read (1 to 1024 of them, with room for the header)", false}
	// ErrFault: the memory of the buffers is gone, as when a peer shortens a shared
	// file; the frame is lost (EFAULT). Pumps make a MemoryError of it.
	ErrFault error = &ioSentinel{"tunbridge: the memory of the frame is not accessible", false}
	// ErrGone: somebody removed the interface (EBADFD). Close it; open it anew.
	ErrGone error = &ioSentinel{"tunbridge: the interface was removed by somebody else", false}
	// ErrClosed: Close was called.
	ErrClosed error = &ioSentinel{"tunbridge: the interface is closed", false}
)

// IsDrop tells whether err is an ErrDropped.
func IsDrop(err error) bool {
	s, ok := err.(*ioSentinel)
	return ok && s.drop
}

// MemoryError is the end of a pump whose queue's memory is gone, as when its owner shortens a shared file (EFAULT). It
// is ErrFault for errors.Is. The interface is all right.
type MemoryError struct {
	Queue string // device and queue, as PumpConfig.Name has it
}

// Error names the queue.
func (e *MemoryError) Error() string {
	return e.Queue + ": the memory of its buffers is not accessible any more (EFAULT): its owner shortened or unmapped it"
}

// Unwrap returns ErrFault.
func (e *MemoryError) Unwrap() error { return ErrFault }

// ioError maps an errno of the data path.
func (it *Iface) ioError(op string, e unix.Errno) error {
	if e == unix.EINVAL && op == opRead {
		return ErrBuffers
	}
	switch e {
	case unix.EAGAIN:
		return ErrAgain
	case unix.EIO, unix.ENETDOWN:
		return ErrDown
	case unix.ENOBUFS, unix.ENOMEM:
		return ErrNoMemory
	case unix.EINVAL, unix.EMSGSIZE:
		return ErrMalformed
	case unix.EFAULT:
		return ErrFault
	case unix.EBADFD:
		return ErrGone
	case unix.EBADF:
		return ErrClosed
	}
	return fmt.Errorf("tunbridge: interface %d: %s: %w", it.Index(), op, e)
}
