package device

import "errors"

// Cause says what is at fault where a device needs a reset.
type Cause uint8

const (
	// CausePeer: the driver, or nobody in particular.
	CausePeer Cause = iota
	// CauseEnd: what the device is joined to is gone; whoever looks after it tells of it.
	CauseEnd
	// CauseMemory: the shared memory cannot be used any more, not by any device.
	CauseMemory
)

// Error is an error of a device model with its cause.
type Error struct {
	Cause Cause
	Err   error
}

// Error implements error.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the error itself.
func (e *Error) Unwrap() error { return e.Err }

// CauseOf returns the cause of an error of a device model: CausePeer where it says none.
func CauseOf(err error) Cause {
	var e *Error
	if errors.As(err, &e) {
		return e.Cause
	}
	return CausePeer
}
