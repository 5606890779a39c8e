package virtiomsg

import "fmt"

// Event is what Poll tells its caller to do.
type Event uint8

const (
	// EventNone: nothing; wait to be rung or for the next tick.
	EventNone Event = iota
	// EventPeer: the peer's block has been read and is good. Peer tells how to ring it.
	EventPeer
	// EventUp: both sides have let go of everything that was before, and messages may be sent.
	// The agent may now rewrite all memory that it shows. (The host's pool is the agent's to
	// fill: the agent may have come up, and begun, before the host.)
	EventUp
	// EventQuiesce: the link is no longer up, Reason tells why. The caller stops whatever
	// touches the peer's or shared memory, makes sure that its writes across the bus have
	// landed (see Quiesced), and calls Quiesced. It does not rewrite memory that it has shown
	// until the next EventUp.
	EventQuiesce
	// EventStopped: after Stop, the peer has let go. Regions and pool may be unmapped and freed.
	// (Link page and FIFOs stay set apart for the link: a host that is just starting may still
	// write its words there.)
	EventStopped
)

// String names the event.
func (e Event) String() string {
	switch e {
	case EventNone:
		return "none"
	case EventPeer:
		return "peer"
	case EventUp:
		return "up"
	case EventQuiesce:
		return "quiesce"
	case EventStopped:
		return "stopped"
	}
	return fmt.Sprintf("event(%d)", uint8(e))
}

// Reason is why a link is no longer up.
type Reason uint8

const (
	// ReasonNone: it has not been up yet.
	ReasonNone Reason = iota
	// ReasonRestarted: the peer shows another epoch: a new process, or it has reset the link.
	ReasonRestarted
	// ReasonLeft: the peer stops cleanly.
	ReasonLeft
	// ReasonLost: the peer's heartbeat has stood still for too long.
	ReasonLost
	// ReasonDead: the peer's process is known to be dead.
	ReasonDead
	// ReasonGone: the window reads as all-ones.
	ReasonGone
	// ReasonBroken: the peer moved a FIFO index out of bounds.
	ReasonBroken
	// ReasonReset: Reset or Stop was called on this side.
	ReasonReset
	// ReasonWiped: somebody else changed this side's block of the link page.
	ReasonWiped

	reasons = int(ReasonWiped) + 1
)

// String says it in a few words.
func (r Reason) String() string {
	switch r {
	case ReasonNone:
		return "not up yet"
	case ReasonRestarted:
		return "peer restarted"
	case ReasonLeft:
		return "peer left"
	case ReasonLost:
		return "no heartbeat"
	case ReasonDead:
		return "peer dead"
	case ReasonGone:
		return "window gone"
	case ReasonBroken:
		return "peer broke a FIFO"
	case ReasonReset:
		return "reset by this side"
	case ReasonWiped:
		return "link page wiped"
	}
	return fmt.Sprintf("reason(%d)", uint8(r))
}

// LinkStats counts what happened to a link. The fields are updated with sync/atomic.
type LinkStats struct {
	Ups        uint64          // handshakes completed
	Downs      [reasons]uint64 // EventQuiesce, by Reason
	Ticks      uint64
	PageErrors uint64 // blocks of the peer that were refused
	FIFOErrors uint64 // impossible indices
	Sent       uint64 // messages
	Received   uint64
	Full       uint64 // Send found the FIFO full
	Wiped      uint64 // own block found changed by somebody else and written again
}
