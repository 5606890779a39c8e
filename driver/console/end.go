package console

import (
	"errors"

	"github.com/boardlink/boardlink/tty"
)

// End is what a console is joined to on this machine: a terminal, or something in a terminal's place.
type End interface {
	// Read waits for what is to be printed on the console. An error ends the console, as Close does.
	Read(b []byte) (n int, err error)
	// Write passes on what was typed on the console. It may wait until that is taken; what of it cannot be passed on is dropped, and n
	// says how much was not. An error ends the console.
	Write(b []byte) (n int, err error)
	// Resize tells the size of the terminal that somebody looks at.
	Resize(s tty.Size)
	// Keeps tells whether what is not read yet is kept by whoever prints. Then nothing is read while there is no link.
	Keeps() bool
	// Joined names it, for log and status: "/run/con0 (/dev/pts/3)".
	Joined() string
	// State says how it is, for status, with its counters; "" where there is nothing to be told.
	State() (text string, counters map[string]uint64)
	// Close ends Read and Write, and gives everything back before it returns.
	Close() error
}

// errClosed is what Read and Write of an End return after Close.
var errClosed = errors.New("the console is closed")
