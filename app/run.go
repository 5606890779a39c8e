package app

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/app/internal/ifaddr"
	"github.com/boardlink/boardlink/app/internal/statussock"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/netdev"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/netdrv"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tunbridge"
)

// defaultMTU is that of a host's interface, in bytes, unless somebody else made it.
const defaultMTU = 1500

// end is one end of a link.
type end interface {
	Open(context.Context) error
	Run(context.Context) error
	Status() status.Link
}

// opened is a network device that is open, with what was asked for.
type opened interface {
	ifaddr.Device
	Close() error
}

// ends is what is built from a Config.
type ends struct {
	c       *Config
	log     session.Logger
	links   []*link
	machine *Machine // nil: not asked for yet
}

// Run runs one end until ctx ends (package daemon has one that signals end). version is what status tells of the program. Nothing
// is logged before all is known to be well: what is not is the error, in one line. Of several links, those go on that can.
func Run(ctx context.Context, c *Config, version string, log session.Logger) error {
	e := &ends{c: c, log: log}
	err := e.build()
	if err == nil {
		err = e.serve(ctx, version)
	}
	if err != nil && !errors.Is(err, session.ErrStuck) { // else loops may still run: the end of the program closes all
		for _, l := range e.links {
			l.close()
		}
	}
	return err
}

// build makes the links and their devices. Devices that cannot be made are an error where no link is left without; input
// that is wrong on any machine always is.
func (e *ends) build() error {
	prepare := e.prepareHost
	if e.c.Side == board.Agent {
		prepare = e.prepareAgent
	}
	if err := prepare(); err != nil {
		return err
	}
	for _, l := range e.links {
		for _, n := range l.nets {
			if err := n.valid(); err != nil {
				return err
			}
		}
	}
	var failed Errors
	for _, l := range e.links { // one after the other: the kernel numbers interfaces without a name in this order
		if err := l.make(); err != nil {
			failed = append(failed, err)
		}
	}
	return failed.unless(len(e.links), false)
}

// add appends a link for board number b.
func (e *ends) add(b int, create func(l *link) (end, []opened, error)) {
	l := &link{name: e.c.LinkName(b), board: e.c.Boards[b], log: e.log, retry: len(e.c.Boards) > 1, ready: e.ready}
	l.create = func() (end, []opened, error) {
		end, devices, err := create(l)
		if err != nil {
			for _, d := range devices {
				d.Close()
			}
			return nil, nil, err
		}
		return end, devices, nil
	}
	e.links = append(e.links, l)
}

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

// address gives an interface its addresses and sets it up.
func (e *ends) address(n *Net, d opened) error {
	if err := ifaddr.SetUp(d.Interface(), n.Addrs, n.MTU, e.log); err != nil {
		return UsageError{err}
	}
	return nil
}

// iface returns the device's own end.
func (n *Net) iface() tunbridge.Config {
	return tunbridge.Config{Name: n.Name, Type: n.Type, Offload: n.Offload, Persist: n.Persist, MAC: n.MAC, MTU: n.MTU}
}

// stableMACs gives device i the MAC addresses that the operator did not choose, the host's own and the board's: they stay the
// same from start to start, so that neighbour tables stay true, and differ from those of other machines and boards.
func (e *ends) stableMACs(n *Net, i int) error {
	if n.Type != tunbridge.TAP || n.MAC != (tunbridge.MAC{}) && n.BoardMAC != (tunbridge.MAC{}) {
		return nil
	}
	if e.machine == nil {
		m, err := Identify(e.c.MachineID)
		if err != nil {
			return err
		}
		if m.Warning != "" {
			e.log.Warn(m.Warning)
		}
		e.machine = &m
	}
	for _, a := range []struct {
		side board.Side
		mac  *tunbridge.MAC
	}{{board.Host, &n.MAC}, {board.Agent, &n.BoardMAC}} {
		if *a.mac == (tunbridge.MAC{}) {
			*a.mac = e.machine.MAC(e.c.LinkName(n.Board), a.side, e.c.Boards[n.Board], i)
		}
	}
	return nil
}

// options returns how the boards are opened.
func (e *ends) options() board.Options {
	log := session.Limit(e.log) // a server may have its board opened again and again
	o := board.Options{Kind: e.c.Memory, AllowSharedGroup: e.c.AllowSharedGroup, Logf: func(format string, args ...interface{}) {
		e.log.Debug(fmt.Sprintf(format, args...))
	}, Warnf: func(format string, args ...interface{}) {
		log.Warn(fmt.Sprintf(format, args...))
	}}
	if e.c.Account {
		o.Account = new(dma.Account)
	}
	return o
}

// prepareHost describes the links of a host, one for each board.
func (e *ends) prepareHost() error {
	c := e.c
	for b := range c.Boards {
		e.add(b, e.createHost)
	}
	for i := range c.Nets {
		n := c.Nets[i] // a copy: it gets MAC addresses
		l := e.links[n.Board]
		if err := e.stableMACs(&n, len(l.nets)); err != nil {
			return err
		}
		l.nets = append(l.nets, &n)
	}
	return nil
}

// createHost makes the devices of a board, and the host's end of its link.
func (e *ends) createHost(l *link) (end, []opened, error) {
	c := e.c
	var devices []opened
	offered := map[uint16]device.Device{}
	for i, n := range l.nets {
		ic := n.iface()
		if ic.MTU == 0 && ic.Persist { // one of ours; what somebody else made stays as it is
			ic.MTU = defaultMTU
		}
		ic.Queues = n.Queues
		d, err := netdev.New(netdev.Config{Name: fmt.Sprintf("net%d", i), Number: uint16(i), Interface: ic, BoardMAC: n.BoardMAC,
			Deny: c.Deny, Loop: c.Loop.From(i), QueueMax: c.QueueMax})
		if err != nil {
			return nil, devices, err
		}
		devices, offered[uint16(i)] = append(devices, d), d
		if err := e.address(n, d); err != nil {
			return nil, devices, err
		}
	}
	if isDoor(l.board) {
		end, err := e.newDoor(l, offered[0])
		return end, devices, err
	}
	return host.NewLink(host.Config{Name: l.name, Board: l.board, Options: e.options(), Devices: offered, NoPool: !c.Pool,
		DMA: c.DMA, Log: e.log, Beat: c.Beat, LostBeats: c.Lost, NoInterrupts: !c.Interrupts, Retry: l.retry}), devices, nil
}

// prepareAgent describes the one link of an agent.
func (e *ends) prepareAgent() error {
	e.add(0, e.createAgent)
	for i := range e.c.Nets {
		e.links[0].nets = append(e.links[0].nets, &e.c.Nets[i])
	}
	return nil
}

func (e *ends) createAgent(l *link) (end, []opened, error) {
	c := e.c
	var devices []opened
	var nets []driver.Driver
	for i, n := range l.nets {
		d, err := netdrv.New(netdrv.Config{Name: fmt.Sprintf("net%d", i), Number: uint16(i), Interface: n.iface(),
			Deny: c.Deny, Loop: c.Loop.From(i), Ring: c.Ring, Queues: n.Queues, QueueSize: c.QueueSize, RXBuffer: c.RXBuffer})
		if err != nil {
			return nil, devices, err
		}
		devices, nets = append(devices, d), append(nets, d)
		if err := e.address(n, d); err != nil {
			return nil, devices, err
		}
	}
	return agent.NewLink(agent.Config{Name: l.name, Board: l.board, Placement: c.Placement, Options: e.options(), Devices: nets,
		Log: e.log, Beat: c.Beat, LostBeats: c.Lost, NoInterrupts: !c.Interrupts}), devices, nil
}

// serve runs the links until a signal, with their status socket.
func (e *ends) serve(ctx context.Context, version string) error {
	path := e.c.Status
	var unusable error // of the directory for the status socket: not worth to end for
	switch path {
	case "":
		if unusable = statussock.Prepare(); unusable == nil {
			path = StatusPath(e.c.Side.String(), e.c.Name)
		}
	case "none":
		path = ""
	}
	started := time.Now().Format(time.RFC3339)
	srv, err := ServeStatus(path, func() status.Program {
		p := status.Program{Version: version, Side: e.c.Side.String(), PID: os.Getpid(), Started: started}
		if e.c.LogLost != nil {
			p.LogLost = e.c.LogLost()
		}
		for _, l := range e.links {
			p.Links = append(p.Links, l.Status())
		}
		return p
	})
	if err != nil {
		return UsageError{err}
	}
	defer srv.Close()
	if err := e.open(ctx); err != nil {
		return err
	}
	if unusable != nil {
		e.log.Warn("no status socket", "error", unusable)
	}
	ctx, lose := context.WithCancel(ctx)
	defer lose()
	lost := make(chan error, len(e.c.Nets))
	if len(e.links) == 1 { // else the others go on, and it is tried again
		e.links[0].lost = func(err error) {
			lost <- fmt.Errorf("the interface was removed and cannot be made again: %s", OneLine(err))
			lose()
		}
	}
	// One board that fails for good does not take the others along.
	err = e.all(func(l *link) error {
		err := l.Run(ctx)
		if err != nil && len(e.links) > 1 {
			e.log.Error("link given up", "link", l.name, "error", err)
		}
		return err
	}, true)
	select {
	case l := <-lost:
		return l
	default:
		return err
	}
}

// open opens the boards of all links, at the same time, as one may take seconds to fail. An error
// means that no board can be used nor waited for. Otherwise the links go on: their Run waits for
// what is not there, and with several boards also for what is wrong (link, session.Config.Retry).
func (e *ends) open(ctx context.Context) error {
	return e.all(func(l *link) error { return l.Open(ctx) }, false)
}

// all calls f for all links at the same time. It returns the errors, or nil where some succeed unless each error counts.
func (e *ends) all(f func(l *link) error, each bool) error {
	var wg sync.WaitGroup
	errs := make([]error, len(e.links))
	for i, l := range e.links {
		wg.Add(1)
		go func(i int, l *link) {
			defer wg.Done()
			errs[i] = f(l)
		}(i, l)
	}
	wg.Wait()
	var failed Errors
	for _, err := range errs {
		if err != nil {
			failed = append(failed, err)
		}
	}
	return failed.unless(len(errs), each)
}

// ready tells of an interface that is set up.
func (e *ends) ready(n *Net, d opened) {
	i := d.Interface()
	for _, w := range i.Warnings() {
		e.log.Warn(w, "interface", i.Name())
	}
	for _, w := range strayAddresses(i, n) {
		e.log.Warn(w, "interface", i.Name())
	}
	e.log.Info("interface ready", "interface", i.Name(), "addresses", n.Addrs)
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

// Errors are several errors, of several links.
type Errors []error

// unless returns the errors of n links, or nil where some have none unless each error counts.
func (es Errors) unless(n int, each bool) error {
	switch {
	case len(es) == 0 || len(es) < n && !each:
		return nil
	case len(es) == 1:
		return es[0]
	}
	return es
}

// Error returns them in one line.
func (es Errors) Error() string {
	var s []string
	for _, err := range es {
		s = append(s, OneLine(err))
	}
	return strings.Join(s, "; ")
}

// Is tells whether one of them is the target.
func (es Errors) Is(target error) bool {
	for _, err := range es {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// As finds the first of them that the target fits.
func (es Errors) As(target interface{}) bool {
	for _, err := range es {
		if errors.As(err, target) {
			return true
		}
	}
	return false
}
