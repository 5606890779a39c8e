package netdrv

import (
	"fmt"

	"github.com/boardlink/boardlink/virtio"
)

// unmet returns what the operator asked for and the device does not have, as the host offers less: a line each. n.mu is held.
func (n *Net) unmet() (lines []string) {
	if n.stop == nil {
		return nil // not up: nothing is known yet
	}
	if want, mtu := n.cfg.Interface.MTU, n.ifc.MTU(); n.acked.Has(virtio.NetMTU) && want > mtu {
		lines = append(lines, fmt.Sprintf("the MTU is %d, not the %d that was asked for: the host's is smaller; raise it there (--mtu)", mtu, want))
	}
	if want := n.cfg.Queues; want > n.setUps {
		why := "there is no memory for more"
		if n.setUps >= n.offers {
			why = "the host offers no more; raise it there (--queues)"
		}
		lines = append(lines, fmt.Sprintf("queue pairs: %d, not the %d that were asked for: %s", n.setUps, want, why))
	}
	return lines
}

// Unmet implements driver.Driver.
func (n *Net) Unmet() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.unmet()
}
