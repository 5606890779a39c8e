package doorbell

// Ringer notifies the other side. Ring is called by one goroutine at a time and does not
// block; earlier stores to the shared memory are visible to the other side before it
// is notified (the implementation holds the store fence that its memory needs).
type Ringer interface {
	Ring() error
}

// Waiter is the end that is rung.
type Waiter interface {
	// FD returns the file descriptor that polls readable when rung, or -1 where
	// nothing can be waited for and polling is all there is.
	FD() int
	// Ack takes the pending rings (and re-enables the interrupt where the kind
	// needs it) and returns their number, 0 where there were none. It does not block.
	Ack() (uint64, error)
}
