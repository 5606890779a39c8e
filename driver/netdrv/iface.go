package netdrv

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/tunbridge"
)

// interfaceChanged takes over what the interface's watcher tells.
func (n *Net) interfaceChanged(s tunbridge.State) {
	n.mu.Lock()
	n.ifaceUp = s.Up && !s.Gone
	if s.Gone {
		n.lastErr = fmt.Errorf("interface %q: %w", s.Name, tunbridge.ErrGone)
	}
	wake := n.wake
	n.mu.Unlock()
	if wake != nil {
		wake()
	}
}

// LinkUp implements driver.Driver: it tells whether the interface is up, as far as its watcher has told.
func (n *Net) LinkUp() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ifaceUp
}

// OnChange implements driver.Driver: it sets who hears that something about the interface has changed.
func (n *Net) OnChange(wake func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wake = wake
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
	if err == nil {
		n.remade = true
		if errors.Is(n.lastErr, tunbridge.ErrGone) {
			n.lastErr = nil
		}
		if n.wake != nil {
			n.wake()
		}
	}
	return err
}

// Remade implements driver.Driver: it tells whether the interface was made again since the last call.
func (n *Net) Remade() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.remade
	n.remade = false
	return r
}

// setBusy notes whether the link's goroutine or a loop uses the interface's descriptors.
func (n *Net) setBusy(busy bool) {
	n.mu.Lock()
	n.busy = busy
	n.mu.Unlock()
}

// warnOnce keeps a warning for takeWarning, unless it was the last one.
func (n *Net) warnOnce(w string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if w != n.warned {
		n.warned, n.warning = w, w
	}
}

// Warning implements driver.Driver: it returns a warning that was not taken yet; empty if there is none.
func (n *Net) Warning() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.warning
	n.warning = ""
	return w
}

// tolerate makes a warning of a refusal for want of privileges: the interface is used as somebody made it.
func (n *Net) tolerate(err error, format string, args ...interface{}) error {
	if err == nil || !n.ifc.Attached() || !errors.Is(err, unix.EPERM) {
		return err
	}
	n.warnOnce("not permitted to change the interface (CAP_NET_ADMIN is missing): " + fmt.Sprintf(format, args...))
	return nil
}
