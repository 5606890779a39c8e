package virtiomsg

import (
	"sync/atomic"
)

// Send puts a message into the FIFO. Errors: ErrDown, ErrFIFOFull, a *FIFOError (the next
// Poll takes the link down).
func (l *Link) Send(s *Slot) error {
	if l.phase != phaseUp || l.broken != ReasonNone {
		return ErrDown
	}
	switch err := l.tx.Put(s); err {
	case nil:
	case ErrFIFOFull:
		atomic.AddUint64(&l.stats.Full, 1)
		return err
	case ErrFIFOSpent:
		l.broken = ReasonReset
		return ErrDown
	default:
		return l.fifoError(err)
	}
	atomic.AddUint64(&l.stats.Sent, 1)
	l.ring = true
	return nil
}

// Room tells whether the FIFO to the peer has room for a message. Errors: as Send's, but for
// ErrFIFOFull.
func (l *Link) Room() (bool, error) {
	if l.phase != phaseUp || l.broken != ReasonNone {
		return false, ErrDown
	}
	ok, err := l.tx.Room()
	if err != nil {
		return false, l.fifoError(err)
	}
	return ok, nil
}

// Peek copies the oldest message that the peer has sent, without taking it, and tells whether there
// is one. Whoever has looked at the copy uses that one, and calls Take: the peer may have written to
// the slot since. Errors: as Recv's.
func (l *Link) Peek(s *Slot) (bool, error) {
	if l.phase != phaseUp || l.broken != ReasonNone {
		return false, ErrDown
	}
	ok, err := l.rx.Peek(s)
	if err != nil {
		return false, l.fifoError(err)
	}
	if ok && l.window.Across && l.w.load32(l.peer+offEpoch) != l.peerEpoch {
		// A reset of the board may have run into the slot while it was read.
		return false, ErrDown
	}
	return ok, nil
}

// Take gives the slot of the message that Peek has returned back to the peer.
func (l *Link) Take() {
	if l.phase != phaseUp || l.broken != ReasonNone {
		return
	}
	l.rx.Take()
	atomic.AddUint64(&l.stats.Received, 1)
	// The producer may be waiting for room: the head that was read before cannot tell, it may have
	// filled the FIFO since.
	l.ring = true
}

// Recv takes a message, and tells whether there was one. Errors: ErrDown, a *FIFOError (the
// next Poll takes the link down).
func (l *Link) Recv(s *Slot) (bool, error) {
	ok, err := l.Peek(s)
	if ok {
		l.Take()
	}
	return ok, err
}

// fifoError judges an impossible index: a peer that starts anew resets its index words after it
// has shown its new epoch.
func (l *Link) fifoError(err error) error {
	if l.w.load32(l.peer+offEpoch) != l.peerEpoch {
		return ErrDown // Poll will tell
	}
	l.broken = ReasonBroken
	atomic.AddUint64(&l.stats.FIFOErrors, 1)
	return err
}
