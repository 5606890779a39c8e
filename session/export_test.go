package session

import (
	"fmt"
	"time"
)

// Tests do not wait long for a board that cannot be opened.
func init() { retryOpen, maxRetryOpen = 5*time.Millisecond, 20*time.Millisecond }

// A transition that the diagram does not have is a mistake.
func init() {
	onIllegal = func(from, to State) { panic(fmt.Sprintf("a transition from %q to %q", from, to)) }
}
