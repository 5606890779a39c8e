package access

import (
	"sync"
	"sync/atomic"

	"github.com/boardlink/boardlink/pci"
)

// Master is the bus mastering of a function as its owner wants it. Messages, a pool and DMA engines die
// silently where somebody else turns it off: Look finds that, and turns it on again.
type Master struct {
	restored uint64 // first: 64-bit alignment
	lost     uint64

	Config *Config
	// Log, if set, hears of what Look finds.
	Log func(format string, args ...interface{})

	mu sync.Mutex
	on bool
}

// Set turns bus mastering on or off.
func (m *Master) Set(on bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.on = on
	if on {
		return m.Config.SetCommand(pci.CommandBusMaster, 0)
	}
	return m.Config.SetCommand(0, pci.CommandBusMaster)
}

// Look turns bus mastering on again where it is wanted and somebody turned it off. The error, which
// matches pci.ErrGone, tells that it does not stay on.
func (m *Master) Look() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.on {
		return nil
	}
	off := func() bool {
		v, err := m.Config.Read(pci.RegCommand, 2)
		return err == nil && v&pci.CommandBusMaster == 0 // what cannot be read is not found out here
	}
	if !off() {
		return nil
	}
	if err := m.Config.SetCommand(pci.CommandBusMaster, 0); err == nil && !off() {
		atomic.AddUint64(&m.restored, 1)
		if m.Log != nil {
			m.Log("bus mastering had been turned off: it is on again")
		}
		return nil
	}
	atomic.AddUint64(&m.lost, 1)
	return &pci.Error{
		Problem: pci.Wiped, Spec: m.Config.Addr.String(), Reason: "its bus mastering was turned off and does not stay on: interrupts by message and DMA do not work",
		Mend: "find out who turns it off; interrupts=off and a placement in the board's window do without",
	}
}

// Counters returns what Look found.
func (m *Master) Counters() pci.Counters {
	return pci.Counters{BusMasterRestored: atomic.LoadUint64(&m.restored), BusMasterLost: atomic.LoadUint64(&m.lost)}
}
