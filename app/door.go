package app

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/boardlink/boardlink/control/vhostuser"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/tunbridge"
)

// isDoor tells whether a spec of --board is that of a vhost-user front end (a virtual machine, a
// DPDK program), which stands where a board does.
func isDoor(spec string) bool { return strings.HasPrefix(spec, vhostuser.Prefix) }

// checkDoors checks what depends on the boards that are front ends, and gives their devices what
// the spec says.
func (c *Config) checkDoors() error {
	for b, spec := range c.Boards {
		if !isDoor(spec) {
			continue
		}
		s, err := vhostuser.ParseSpec(spec)
		if err != nil {
			return Usagef("--board %v", err)
		}
		devices := 0
		for i := range c.Nets {
			n := &c.Nets[i]
			if n.Board != b {
				continue
			}
			if devices++; devices > 1 {
				return Usagef("--board %s: several devices: a front end has one for each socket; give each a --board of its own", spec)
			}
			if n.Type != tunbridge.TAP {
				return Usagef("--board %s: --link tun: front ends have Ethernet frames; leave it at tap", spec)
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

// newDoor makes the end of a link to a front end.
func (e *ends) newDoor(l *link, d device.Device) (end, error) {
	s, err := vhostuser.ParseSpec(l.board)
	if err != nil {
		return nil, Usagef("--board %v", err)
	}
	return doorEnd{vhostuser.New(vhostuser.Config{Name: l.name, Board: l.board, Spec: s, Device: d, Log: session.Limit(e.log)}), d}, nil
}

// doorEnd is the end of a link to a front end.
type doorEnd struct {
	*vhostuser.Door
	dev device.Device
}

// Open implements end.
func (d doorEnd) Open(ctx context.Context) error {
	err := d.Door.Open(ctx)
	var in *vhostuser.InputError
	if errors.As(err, &in) {
		return UsageError{err}
	}
	return err
}

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
