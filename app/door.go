package app

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/boardlink/boardlink/app/internal/statussock"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/control/vhostuser"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/netdrv"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/tunbridge"
)

// isDoor tells whether a spec of --board is that of a vhost-user socket. At the host a front end (a
// virtual machine, a DPDK program) stands where a board does; at the agent a back end (a switch, a
// DPDK program) stands where the host does.
func isDoor(spec string) bool { return strings.HasPrefix(spec, vhostuser.Prefix) }

// others returns how many devices other than networks are described for board b, which is a front end: it has one device, and no
// network then.
func (c *Config) others(b int) (n int) {
	if !isDoor(c.Boards[b]) || c.Side == board.Agent {
		return 0
	}
	for i := range c.Disks {
		if c.Disks[i].Board == b {
			n++
		}
	}
	for i := range c.Rngs {
		if c.Rngs[i].Board == b {
			n++
		}
	}
	return n
}

// checkDoors checks what depends on the boards that are front ends, and gives their devices what
// the spec says.
func (c *Config) checkDoors() error {
	for b, spec := range c.Boards {
		if !isDoor(spec) {
			continue
		}
		s, err := c.parseDoor(spec)
		if err != nil {
			return err
		}
		if c.Side == board.Agent && c.Placement == "push" {
			return Usagef("--placement push: not with a vhost-user back end: all of the shared memory is this machine's")
		}
		devices := c.others(b)
		if devices > 1 {
			return Usagef("--board %s: %d devices: there is one for each socket; give each a --board of its own", spec, devices)
		}
		if devices > 0 && s.Queues > 0 {
			return Usagef("--board %s: queues= is for networks; of a disk it is a key of --disk", spec)
		}
		for i := range c.Nets {
			n := &c.Nets[i]
			if n.Board != b {
				continue
			}
			if devices++; devices > 1 {
				return Usagef("--board %s: several devices: there is one for each socket; give each a --board of its own, and of several agents each one", spec)
			}
			if n.Type != tunbridge.TAP {
				return Usagef("--board %s: --link tun: vhost-user carries Ethernet frames; leave it at tap", spec)
			}
			if s.Queues > 0 {
				if n.Queues = s.Queues; n.Queues > tunbridge.MaxQueues {
					return Usagef("--board %s: %d queue pairs: at most %d are possible", spec, s.Queues, tunbridge.MaxQueues)
				}
			}
		}
	}
	return nil
}

// parseDoor reads the spec of a vhost-user socket, as this side has it.
func (c *Config) parseDoor(spec string) (s vhostuser.Spec, err error) {
	if c.Side == board.Agent {
		s, err = vhostuser.ParseFrontendSpec(spec)
	} else {
		s, err = vhostuser.ParseSpec(spec)
	}
	if err != nil {
		err = Usagef("--board %v", err)
	}
	return s, err
}

// newDoor makes the end of a link to a front end.
func (e *ends) newDoor(l *link, d device.Device) (end, error) {
	s, err := e.c.parseDoor(l.board)
	if err != nil {
		return nil, err
	}
	return doorEnd{vhostuser.New(vhostuser.Config{Name: l.name, Board: l.board, Spec: s, Device: d, State: e.c.doorState(s), Log: session.Limit(e.log)}), d}, nil
}

// doorState returns the file in which a socket's packed queues keep their places: beside the status socket, named after the
// socket. It is empty where there is no such directory, or no path that names the socket.
func (c *Config) doorState(s vhostuser.Spec) string {
	path, err := filepath.Abs(s.Path)
	if s.Path == "" || err != nil {
		return ""
	}
	dir := statussock.Dir()
	if c.Status != "" && c.Status != "none" {
		dir = filepath.Dir(c.Status)
	} else if statussock.Prepare() != nil {
		return ""
	}
	sum := sha256.Sum256([]byte(path))
	return filepath.Join(dir, fmt.Sprintf("%x.rings", sum[:8]))
}

// doorEnd is the end of a link to a front end.
type doorEnd struct {
	*vhostuser.Door
	dev device.Device
}

// newFrontend makes the end of a link to a back end.
func (e *ends) newFrontend(l *link, d driver.Driver) (end, error) {
	s, err := e.c.parseDoor(l.board)
	if err != nil {
		return nil, err
	}
	n, ok := d.(*netdrv.Net)
	if !ok {
		return nil, Usagef("--board %s: the device of a vhost-user back end has to be a network device", l.board)
	}
	return frontEnd{vhostuser.NewFrontend(vhostuser.FrontendConfig{Name: l.name, Board: l.board, Spec: s, Driver: d, MTU: n.Interface().MTU, Log: session.Limit(e.log)}), d}, nil
}

// frontEnd is the end of a link to a back end.
type frontEnd struct {
	*vhostuser.Frontend
	drv driver.Driver
}

// Open implements end.
func (f frontEnd) Open(ctx context.Context) error { return openError(f.Frontend.Open(ctx)) }

// Run implements end.
func (f frontEnd) Run(ctx context.Context) error {
	err := f.Frontend.Run(ctx)
	if cerr := f.drv.Close(); err == nil {
		err = cerr
	}
	return err
}

// openError marks an error of the user's making.
func openError(err error) error {
	var in *vhostuser.InputError
	if errors.As(err, &in) {
		return UsageError{err}
	}
	return err
}

// Open implements end.
func (d doorEnd) Open(ctx context.Context) error { return openError(d.Door.Open(ctx)) }

// Run implements end. The device is closed at its end, unless its loops may still run.
func (d doorEnd) Run(ctx context.Context) error {
	err := d.Door.Run(ctx)
	if errors.Is(err, vhostuser.ErrStuck) {
		return fmt.Errorf("%w: %v", session.ErrStuck, err)
	}
	if cerr := d.dev.Close(); err == nil {
		err = cerr
	}
	return err
}
