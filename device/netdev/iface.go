package netdev

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/tunbridge"
)

var _ device.Linked = (*Net)(nil)

// interfaceChanged takes over what the interface's watcher tells: the driver hears of it as of a changed
// configuration.
func (n *Net) interfaceChanged(s tunbridge.State) {
	n.mu.Lock()
	now := linkState{up: s.Up && !s.Gone, mtu: s.MTU}
	changed := now != n.told
	n.told = now
	if s.Gone {
		n.lastErr = fmt.Errorf("interface %q: %w", s.Name, tunbridge.ErrGone)
	}
	notify := n.notify
	n.mu.Unlock()
	if changed && notify != nil {
		notify(device.Event{})
	}
}

// linkState is what the configuration space tells of the interface.
type linkState struct {
	up  bool
	mtu int
}

// linkState asks for what the configuration space is to tell now.
func (n *Net) linkState() linkState {
	s := n.ifc.State()
	return linkState{up: s.Up && !s.Gone, mtu: s.MTU}
}

// SetPeerLink switches the carrier: off while the driver's end of the link is down.
func (n *Net) SetPeerLink(up bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.peerDown = !up
	if !n.running || n.carrier == up {
		return
	}
	if err := n.ifc.SetCarrier(up); err != nil {
		n.lastErr = err
		return
	}
	n.carrier = up
}

// Remake makes the interface again that somebody removed: see tunbridge.Iface.Remake. While the device runs the
// error matches tunbridge.ErrInUse. Any goroutine may call it.
func (n *Net) Remake() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.busy {
		return fmt.Errorf("%s: %w", n.cfg.Name, tunbridge.ErrInUse)
	}
	err := n.ifc.Remake()
	if err != nil && !errors.Is(err, tunbridge.ErrClosed) {
		n.lastErr = fmt.Errorf("the interface was removed, and making it again fails: %w", err)
	}
	if err == nil && errors.Is(n.lastErr, tunbridge.ErrGone) {
		n.lastErr = nil
	}
	return err
}
