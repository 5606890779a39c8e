package device

import (
	"fmt"

	"github.com/boardlink/boardlink/virtio"
)

// Room is how much memory the driver's side has for the rings and buffers of all its devices.
type Room struct {
	Board uint64 // bytes of the board's memory
	Pool  uint64 // bytes of the device side's memory that the driver may use
	// Devices is how many devices share both.
	Devices int
	// Push tells that the driver uses the pool.
	Push bool
}

// String says how much it is.
func (r Room) String() string {
	s := fmt.Sprintf("%d bytes of the board", r.Board)
	if r.Pool > 0 {
		s += fmt.Sprintf(" and %d of this side", r.Pool)
	}
	if r.Devices == 1 {
		return s + " for 1 device"
	}
	return fmt.Sprintf("%s for %d devices", s, r.Devices)
}

// Explainer is a Device that can say why a driver does without some of its features.
type Explainer interface {
	// Without says which features that matter the driver did not accept, and why, as far as it shows from r; ""
	// where it accepted them all. It is called after SetRunning, on the control plane's goroutine.
	Without(accepted virtio.Features, r Room) string
}
