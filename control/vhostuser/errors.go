package vhostuser

import (
	"errors"
	"fmt"
)

// What is wrong with a message. An Error has one of them as its Code.
var (
	// ErrVersion: the header has another version than 1, or is that of a reply where a request is
	// wanted, or the other way round.
	ErrVersion = errors.New("no message of protocol version 1 in this direction")
	// ErrLength: the payload is too long, too short, or not as long as it says.
	ErrLength = errors.New("wrong length")
	// ErrDescriptors: too few or too many file descriptors, or one of the wrong kind.
	ErrDescriptors = errors.New("wrong file descriptors")
	// ErrMemory: a memory region cannot be used.
	ErrMemory = errors.New("unusable memory region")
	// ErrQueue: there is no such queue, or its size, base or flags cannot be.
	ErrQueue = errors.New("impossible queue")
	// ErrAddress: a ring lies in no memory region.
	ErrAddress = errors.New("ring outside the memory")
	// ErrFeatures: features that were not offered, or that cannot be used.
	ErrFeatures = errors.New("impossible features")
	// ErrLog: a dirty log cannot be used, is too small for what is to be marked, or is missing.
	ErrLog = errors.New("unusable dirty log")
	// ErrUnknown: a request that this back end does not know, or whose protocol feature was not
	// negotiated.
	ErrUnknown = errors.New("unknown request")
	// ErrValue: a value out of bounds.
	ErrValue = errors.New("value out of bounds")
)

// Error is a message that cannot be served. Match its Code by errors.Is.
type Error struct {
	Request Request
	Code    error
	Detail  string
}

// Error names the message, what is wrong with it, and the values.
func (e *Error) Error() string {
	if e.Detail == "" {
		return fmt.Sprintf("%s: %v", e.Request, e.Code)
	}
	return fmt.Sprintf("%s: %v: %s", e.Request, e.Code, e.Detail)
}

// Unwrap returns the Code.
func (e *Error) Unwrap() error { return e.Code }
