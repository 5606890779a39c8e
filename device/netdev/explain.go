package netdev

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
)

var _ device.Explainer = (*Net)(nil)

// Without implements device.Explainer: it says which segmentation bits the driver did not accept, and why. A driver
// without room for frames of 64 KiB leaves them out (docs/wire.md, section 7).
func (n *Net) Without(accepted virtio.Features, r device.Room) string {
	lost := n.Features().Without(accepted).And(virtio.FeaturesFromMask(tunbridge.NetFToDriverLong | tunbridge.NetFToDeviceLong))
	if lost == (virtio.Features{}) {
		return ""
	}
	shares := r.Devices
	if pairs := n.readyPairs(); pairs > 1 {
		shares *= pairs
	}
	room := r.Board / uint64(shares)
	if r.Push && r.Pool/uint64(shares) < room {
		room = r.Pool / uint64(shares)
	}
	if !r.Push {
		room /= 2 // for both directions
	}
	if room < tunbridge.LongRoom+tunbridge.LongRoom/8 { // and rings
		return fmt.Sprintf("without %s: frames of 64 KiB have no room in %s, they take %d for each queue pair and direction", lost, r, tunbridge.LongRoom)
	}
	return fmt.Sprintf("without %s: the agent does not accept them", lost)
}

// readyPairs returns how many queue pairs the driver has set up.
func (n *Net) readyPairs() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	ready := 0
	for i := range n.pairs {
		if n.pairs[i].ready() {
			ready++
		}
	}
	return ready
}

// withCause names the cause of an error, for the control plane.
func withCause(err error) error {
	switch {
	case errors.Is(err, tunbridge.ErrGone):
		return &device.Error{Cause: device.CauseEnd, Err: err}
	case errors.Is(err, tunbridge.ErrFault), errors.Is(err, pci.ErrGone), errors.Is(err, dma.ErrRunaway):
		return &device.Error{Cause: device.CauseMemory, Err: err}
	}
	return err
}
