package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/app/internal/statussock"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/ctl"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
)

// end is one end of a link.
type end interface {
	Open(context.Context) error
	Run(context.Context) error
	Status() status.Link
}

// ends is what is built from a Config.
type ends struct {
	c     *Config
	log   session.Logger
	links []*link
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
	napping(e.c)
	create := e.createHost
	if e.c.Side == board.Agent {
		create = e.createAgent
	}
	for b := range e.c.Boards {
		e.add(b, create)
	}
	for b, l := range e.links {
		next := uint16(0) // of the types whose numbers follow each other
		for i := range e.c.Types {
			plans, err := e.c.Types[i].Plan(e.c, b, e.log)
			if err != nil {
				return err
			}
			number := &next
			if first := e.c.Types[i].First; first != 0 {
				number = &first
			}
			for _, p := range plans {
				l.plans = append(l.plans, numbered{p, *number, e.c.Types[i].classOf(p)})
				*number++
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
func (e *ends) add(b int, create func(l *link) (end, []io.Closer, error)) {
	l := &link{name: e.c.LinkName(b), board: e.c.Boards[b], log: e.log, retry: len(e.c.Boards) > 1}
	l.create = func() (end, []io.Closer, error) {
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

// createHost makes the devices of a board, and the host's end of its link.
func (e *ends) createHost(l *link) (end, []io.Closer, error) {
	c := e.c
	var made []io.Closer
	offered := map[uint16]device.Device{}
	for _, nets := range []bool{false, true} { // networks last: others see an interface come, and go where something else fails
		for _, p := range l.plans {
			if _, ok := p.Plan.(*netPlan); ok != nets {
				continue
			}
			d, err := p.Model(p.number)
			if err != nil {
				return nil, made, err
			}
			made, offered[p.number] = append(made, d), d
		}
	}
	if isDoor(l.board) {
		end, err := e.newDoor(l, offered[l.plans[0].number]) // the only one
		return end, made, err
	}
	return host.NewLink(host.Config{Name: l.name, Board: l.board, Options: e.options(), Devices: offered, Classes: l.classes(), NoPool: !c.Pool,
		DMA: c.DMA, Log: e.log, Beat: c.Beat, LostBeats: c.Lost, NoInterrupts: !c.Interrupts, Retry: l.retry}), made, nil
}

// createAgent makes the drivers of an agent, and its end of the link.
func (e *ends) createAgent(l *link) (end, []io.Closer, error) {
	c := e.c
	var made []io.Closer
	var drivers []driver.Driver
	for _, p := range l.plans {
		d, err := p.Driver(p.number)
		if err != nil {
			return nil, made, err
		}
		made, drivers = append(made, d), append(drivers, d)
	}
	if isDoor(l.board) {
		end, err := e.newFrontend(l, drivers[0])
		return end, made, err
	}
	return agent.NewLink(agent.Config{Name: l.name, Board: l.board, Placement: c.Placement, Options: e.options(), Devices: drivers, Classes: l.classes(),
		Log: e.log, Beat: c.Beat, LostBeats: c.Lost, NoInterrupts: !c.Interrupts}), made, nil
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
	srv, err := ServeControl(path, func() status.Program {
		p := status.Program{Version: version, Side: e.c.Side.String(), PID: os.Getpid(), Started: started}
		if e.c.LogLost != nil {
			p.LogLost = e.c.LogLost()
		}
		for _, l := range e.links {
			p.Links = append(p.Links, l.Status())
		}
		return p
	}, map[string]Verb{ctl.VerbConsole: e.attach})
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
	lost := make(chan error, 1)
	if len(e.links) == 1 { // else the others go on, and it is tried again
		e.links[0].lost = func(err error) {
			select {
			case lost <- fmt.Errorf("the interface was removed and cannot be made again: %s", OneLine(err)):
			default: // another one was before
			}
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
