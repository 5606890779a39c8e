package app

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/boardlink/boardlink/app/internal/statussock"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/block"
	"github.com/boardlink/boardlink/driver/block/export"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
)

// agentDiskKeys are the keys of an agent's --disk.
const agentDiskKeys = "name export queues class"

// setAgent is set for the keys of an agent.
func (d *Disk) setAgent(k, v string) (err error) {
	switch k {
	case "export":
		d.Export = v
	case "queues":
		if d.Queues, err = strconv.Atoi(v); err != nil || d.Queues < 1 || d.Queues > block.MaxQueues {
			err = fmt.Errorf("%q is not a number of queues: 1 to %d", v, block.MaxQueues)
		}
	default:
		err = errors.New("no such key; an agent has " + agentDiskKeys)
	}
	return err
}

// completeAgent is complete for an agent's disk.
func (d *Disk) completeAgent() error {
	if d.Export == "" {
		return errors.New("export=PATH is missing: the socket that NBD clients use the disk by")
	}
	return nil
}

// agentDisk is a disk with those who use it.
type agentDisk struct {
	*block.Disk
	srv *export.Server
}

// Driver implements Plan.
func (p *diskPlan) Driver(number uint16) (driver.Driver, error) {
	fail := func(err error) (driver.Driver, error) { return nil, Usagef("--disk name=%s: %w", p.Name, err) }
	d, err := block.New(block.Config{Name: p.Name, Number: number, Queues: p.Queues, Deny: p.c.Deny, Joined: p.Export})
	if err != nil {
		return fail(err)
	}
	log := session.Limit(p.log) // clients may come and go without end
	a := &agentDisk{d, export.New(export.Config{Name: p.Name, Disk: d, Failed: func(err error) {
		log.Warn("the connection of an NBD client is closed", "device", p.Name, "error", err)
	}})}
	if err := os.MkdirAll(filepath.Dir(p.Export), 0o755); err != nil {
		return fail(err)
	}
	l, err := statussock.ListenAt(p.Export)
	if err != nil {
		return fail(fmt.Errorf("export=%w", err))
	}
	if err := a.srv.Serve(l); err != nil {
		return fail(err)
	}
	return a, nil
}

// Status implements driver.Driver.
func (a *agentDisk) Status() status.Device {
	d := a.Disk.Status()
	for k, v := range a.srv.Counters() {
		d.Counters[k] = v
	}
	return d
}

// Close implements driver.Driver.
func (a *agentDisk) Close() error {
	err := a.Disk.Close() // clients are told
	if serr := a.srv.Close(); err == nil {
		err = serr
	}
	return err
}
