package app

import (
	"errors"
	"fmt"
	"strings"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/tunbridge"
)

// Exit statuses of all programs.
const (
	ExitOK    = 0
	ExitFail  = 1 // the program's own failure, or a measurement that is not good
	ExitUsage = 2 // what was typed, or how the machine is set up
)

// UsageError is the user's fault: what was typed, or how the machine is set up. It ends a program with
// status 2.
type UsageError struct{ Err error }

// Error returns the text of the cause.
func (e UsageError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e UsageError) Unwrap() error { return e.Err }

// Usagef returns a UsageError.
func Usagef(format string, args ...interface{}) error {
	return UsageError{fmt.Errorf(format, args...)}
}

// ExitStatus returns the status that an error ends a program with.
func ExitStatus(err error) int {
	var us UsageError
	var tu tunbridge.UserError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &us), errors.As(err, &tu), errors.Is(err, board.ErrInput), errors.Is(err, board.ErrSideTaken),
		errors.Is(err, board.ErrAbsent): // those who can wait for it do
		return ExitUsage
	}
	return ExitFail
}

// OneLine returns the text of an error in one line.
func OneLine(err error) string { return strings.Replace(err.Error(), "\n", "; ", -1) }
