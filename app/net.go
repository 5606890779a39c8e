package app

import (
	"fmt"
	"net"

	"github.com/boardlink/boardlink/app/internal/ifaddr"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/netdev"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/netdrv"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/tunbridge"
)

// defaultMTU is that of a host's interface, in bytes, unless somebody else made it.
const defaultMTU = 1500

// netPlan is a network device as it is to be made.
type netPlan struct {
	Net
	c    *Config
	log  session.Logger
	i    int    // its number among the network devices of its link
	made opened // nil: not made yet
}

// opened is a network device that is open, with what was asked for.
type opened interface {
	ifaddr.Device
	Close() error
}

// planNets is the network device's DeviceType.Plan.
func planNets(c *Config, b int, log session.Logger) ([]Plan, error) {
	var plans []Plan
	for _, n := range c.Nets { // a copy of each: it gets MAC addresses
		if n.Board != b {
			continue
		}
		p := &netPlan{Net: n, c: c, log: log, i: len(plans)}
		if c.Side == board.Host {
			if err := p.stableMACs(); err != nil {
				return nil, err
			}
		} else if isDoor(c.Boards[b]) && p.MAC == (tunbridge.MAC{}) {
			// A vhost-user back end gives no MAC address.
			if err := p.stableMACs(); err != nil {
				return nil, err
			}
			p.MAC = p.BoardMAC
		}
		if err := p.valid(); err != nil {
			return nil, err
		}
		plans = append(plans, p)
	}
	return plans, nil
}

func (p *netPlan) name() string { return fmt.Sprintf("net%d", p.i) }

// Model implements Plan.
func (p *netPlan) Model(number uint16) (device.Device, error) {
	ic := p.iface()
	if ic.MTU == 0 && ic.Persist { // one of ours; what somebody else made stays as it is
		ic.MTU = defaultMTU
	}
	ic.Queues = p.Queues
	d, err := netdev.New(netdev.Config{Name: p.name(), Number: number, Interface: ic, BoardMAC: p.BoardMAC,
		Deny: p.c.Deny, Loop: p.c.Loop.From(p.i), QueueMax: p.c.QueueMax})
	if err != nil {
		return nil, err
	}
	if err := p.address(d); err != nil {
		return nil, err
	}
	return d, nil
}

// Driver implements Plan.
func (p *netPlan) Driver(number uint16) (driver.Driver, error) {
	c := p.c
	d, err := netdrv.New(netdrv.Config{Name: p.name(), Number: number, Interface: p.iface(), Deny: c.Deny, Loop: c.Loop.From(p.i),
		Ring: c.Ring, Queues: p.Queues, QueueSize: c.QueueSize, RXBuffer: c.RXBuffer})
	if err != nil {
		return nil, err
	}
	if err := p.address(d); err != nil {
		return nil, err
	}
	return d, nil
}

// address gives the interface of a device its addresses and sets it up; after an error the device is closed.
func (p *netPlan) address(d opened) error {
	if err := ifaddr.SetUp(d.Interface(), p.Addrs, p.MTU, p.log); err != nil {
		d.Close()
		return UsageError{err}
	}
	p.made = d
	return nil
}

// keep implements keeper: it tells of the interface, and gives it its addresses again where somebody takes them.
func (p *netPlan) keep(lost func(error)) (stop func()) {
	p.ready()
	k := ifaddr.Keep(ifaddr.KeepConfig{Device: p.made, Addrs: p.Addrs, Log: p.log, Lost: lost})
	return func() { k.Close() }
}

func (p *netPlan) class() (doorbell.Class, bool) { return p.Net.Class.class() }

// valid refuses what no machine would take.
func (n *Net) valid() error {
	if err := n.iface().Validate(); err != nil {
		return err
	}
	if err := ifaddr.Check(n.Name, n.Addrs, n.MTU); err != nil {
		return UsageError{err}
	}
	return nil
}

// iface returns the device's own end.
func (n *Net) iface() tunbridge.Config {
	return tunbridge.Config{Name: n.Name, Type: n.Type, Offload: n.Offload, Persist: n.Persist, MAC: n.MAC, MTU: n.MTU}
}

// stableMACs gives the device the MAC addresses that the operator did not choose, the host's own and the board's: they stay the
// same from start to start, so that neighbour tables stay true, and differ from those of other machines and boards.
func (p *netPlan) stableMACs() error {
	n, c := &p.Net, p.c
	if n.Type != tunbridge.TAP || n.MAC != (tunbridge.MAC{}) && n.BoardMAC != (tunbridge.MAC{}) {
		return nil
	}
	if c.machine == nil {
		m, err := Identify(c.MachineID)
		if err != nil {
			return err
		}
		if m.Warning != "" {
			p.log.Warn(m.Warning)
		}
		c.machine = &m
	}
	for _, a := range []struct {
		side board.Side
		mac  *tunbridge.MAC
	}{{board.Host, &n.MAC}, {board.Agent, &n.BoardMAC}} {
		if *a.mac == (tunbridge.MAC{}) {
			*a.mac = c.machine.MAC(c.LinkName(n.Board), a.side, c.Boards[n.Board], p.i)
		}
	}
	return nil
}

// ready tells of an interface that is set up.
func (p *netPlan) ready() {
	i := p.made.Interface()
	for _, w := range i.Warnings() {
		p.log.Warn(w, "interface", i.Name())
	}
	for _, w := range strayAddresses(i, &p.Net) {
		p.log.Warn(w, "interface", i.Name())
	}
	p.log.Info("interface ready", "interface", i.Name(), "addresses", p.Addrs)
}

// strayAddresses warns of addresses that an interface kept from another start, and that the flags do not give it: nobody else
// would tell that it still has them.
func strayAddresses(i *tunbridge.Iface, n *Net) (warnings []string) {
	if !i.Attached() || len(n.Addrs) == 0 {
		return nil
	}
	ni, err := net.InterfaceByName(i.Name())
	if err != nil {
		return nil
	}
	as, err := ni.Addrs()
	if err != nil {
		return nil
	}
	wanted := map[string]bool{}
	for _, p := range n.Addrs {
		wanted[p.String()] = true
	}
	for _, a := range as {
		ip, ok := a.(*net.IPNet)
		if ok && !ip.IP.IsLinkLocalUnicast() && !wanted[ip.String()] {
			warnings = append(warnings, fmt.Sprintf("the interface was there already and keeps its address %s, which --addr does not give; to remove it: ip addr del %s dev %s", ip, ip, i.Name()))
		}
	}
	return warnings
}
