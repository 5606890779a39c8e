package tunbridge

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Remake makes an interface again that somebody removed, in the network namespace that it was opened in, with the name
// that Open gave it and the MAC address, MTU and number of queues that were known last: carrier off, no offload, down, without
// addresses. Nobody may read or write meanwhile, or use an earlier FD. Where the interface is there, nothing is done. After an
// error everything is as before. Not permitted is an error that matches unix.EPERM or unix.EACCES.
func (it *Iface) Remake() error {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	if it.fd < 0 {
		return ErrClosed
	}
	if err := it.refresh(); !errors.Is(err, ErrGone) {
		return err
	}
	cfg := it.cfg
	cfg.Name, cfg.Queues = it.made, len(it.queues)
	if cfg.MTU = it.mtu; cfg.MTU < MinMTU {
		cfg.MTU = 0
	}
	if it.typ == TAP {
		cfg.MAC = it.mac
	}
	n, err := it.openHome(cfg)
	if err != nil {
		return err
	}
	if n.hdrLen != it.hdrLen || n.supported != it.supported || len(n.queues) < len(it.queues) {
		err := fmt.Errorf("tunbridge: interface %q was made again otherwise than before: header %d, offload %v, %d queues; it had header %d, offload %v, %d queues",
			n.name, n.hdrLen, n.supported, len(n.queues), it.hdrLen, it.supported, len(it.queues))
		n.Close()
		return err
	}
	for i, q := range it.queues {
		unix.Close(q.fd)
		q.fd, n.queues[i].fd = n.queues[i].fd, -1
	}
	it.closeControl()
	it.ctl, n.ctl = n.ctl, -1
	it.at.id, it.at.left = it.at.homeID, false
	it.setIndex(n.Index())
	it.name, it.mac, it.multi, it.inUse, it.warnings = n.name, n.mac, n.multi, n.inUse, n.warnings
	it.isUp = false
	it.noteMTU(n.mtu)
	it.attached = n.attached
	it.remakes++
	if it.watch != nil {
		it.watch.nudge()
	}
	n.Close()
	return nil
}

// openHome opens an interface in the namespace that it was opened in.
func (it *Iface) openHome(cfg Config) (n *Iface, err error) {
	cur, here := openThreadNetns()
	if cur >= 0 {
		unix.Close(cur)
	}
	if here == it.at.homeID {
		return Open(cfg)
	}
	err = inNetns(it.at.home, func() error {
		n, err = Open(cfg)
		return err
	})
	return n, err
}

// Remakes returns how often Remake has made the interface again.
func (it *Iface) Remakes() int {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	return it.remakes
}

// Gone tells whether somebody removed the interface.
func (it *Iface) Gone() bool {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	return it.fd >= 0 && errors.Is(it.refresh(), ErrGone)
}
