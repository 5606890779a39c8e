package virtiomsg

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// nextEpoch picks an epoch that was not used since Start, that the peer does not echo, and that
// is neither 0 nor all-ones.
func (l *Link) nextEpoch() {
	stale := l.w.load32(l.peer + offEcho)
	for {
		l.epoch += 0x9e3779b9 // odd: comes back after 2^32 steps
		if l.epoch != 0 && l.epoch != allOnes && l.epoch != stale {
			return
		}
	}
}

// publish writes the whole own block with a new epoch. No loop of this side runs: the epoch is 0
// for a while, which says just that.
func (l *Link) publish() {
	l.republish = false
	l.setEcho(0)
	l.w.store32(l.own+offEpoch, 0)
	l.image.write(&l.w, l.side)
	l.w.store32(l.own+offBeat, l.beat)
	l.newEpoch()
}

// newEpoch shows a new epoch with no echo. The order is what the peer relies on: whoever reads the
// new epoch and then an echo reads one that was given under the new epoch; and finds the
// state that belongs to it.
func (l *Link) newEpoch() {
	l.setEcho(0)
	l.nextEpoch()
	state := uint32(StateStarting)
	if l.stopping {
		state = StateStopping
	}
	l.w.store32(l.own+offState, state)
	l.w.store32(l.own+offEpoch, l.epoch)
	l.released = false
	l.ring = true
}

func (l *Link) setEcho(v uint32) {
	l.w.store32(l.own+offEcho, v)
	l.echo = v
}

// stands tells whether the own block is in the window as this side wrote it.
func (l *Link) stands() bool {
	e, o := l.w.load64(l.own + offEpoch)
	return e == l.epoch && o == l.echo && l.image.stands(&l.w, l.side)
}

// wholeCheck is how many ticks pass between two comparisons of the whole own block, while one of the
// sides is not up.
const wholeCheck = 10

// wiped tells, on a tick of a link that one side at least is not up on, whether somebody else changed the own block. Each
// tick looks at three words, which no wiping of the block leaves as they were: magic comes first
// whenever the block is written. Each tenth tick looks at all of it.
func (l *Link) wiped() bool {
	if l.looks++; l.looks >= wholeCheck {
		l.looks = 0
		return !l.stands()
	}
	if e, o := l.w.load64(l.own + offEpoch); e != l.epoch || o != l.echo {
		return true
	}
	return l.w.load32(l.own+offMagic) != Magic
}

// rewrite publishes the own block, which was changed by somebody else, with a new epoch. The peer's
// epoch is to be answered once more.
func (l *Link) rewrite() {
	atomic.AddUint64(&l.stats.Wiped, 1)
	l.peerEpoch, l.badEpoch = 0, 0
	l.publish()
}

func getrandom() (uint32, error) {
	var b [4]byte
	for {
		n, err := unix.Getrandom(b[:], 0)
		if err == nil && n == len(b) {
			return binary.LittleEndian.Uint32(b[:]), nil
		}
		if err != nil && err != unix.EINTR {
			return 0, fmt.Errorf("virtiomsg: getrandom: %v", err)
		}
	}
}
