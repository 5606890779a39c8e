package app

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/block"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/nbd"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/virtio"
)

// diskNumber is the device number of the first disk. Both ends count their disks from it, in the order of their --disk.
const diskNumber = 128

// maxDisks is how many disks a board can have.
const maxDisks = 32

// Disk is a disk for a board, as an operator describes it.
type Disk struct {
	Name  string
	Board int // which of the boards it is for
	Class Class

	// The host's.
	File         string // image or block device
	NBD          string // socket of an NBD server, instead of File
	NBDExport    string // of that server; "": its default
	ReadOnly     bool
	Direct       bool
	WriteThrough bool
	Serial       string // "": Name
	Queues       int

	// The agent's; Queues too.
	Export string // path of a socket for NBD clients

	text string // as it was given
}

// hostDiskKeys are the keys of a host's --disk.
const hostDiskKeys = "name file nbd nbd-export ro serial cache direct queues board class"

// setDisk is the set of --disk.
func setDisk(c *Config, v string) error {
	d := Disk{Queues: 1, text: "--disk " + v}
	for _, kv := range strings.Split(v, ",") {
		k, v := kv, "true" // ro is ro=true
		if i := strings.IndexByte(kv, '='); i >= 0 {
			k, v = kv[:i], kv[i+1:]
		} else if kv != "ro" && kv != "direct" {
			return fmt.Errorf("%q is not KEY=VALUE", kv)
		}
		if v == "" {
			return fmt.Errorf("%s: must not be empty", k)
		}
		if err := d.set(c.Side, k, v); err != nil {
			return fmt.Errorf("%s: %v", k, err)
		}
	}
	if d.Name == "" {
		return errors.New("name=NAME is missing: what log and status call the disk")
	}
	if err := d.complete(c.Side); err != nil {
		return err
	}
	c.Disks = append(c.Disks, d)
	return nil
}

// set gives one property of a disk, by its key.
func (d *Disk) set(side board.Side, k, v string) (err error) {
	switch {
	case k == "name":
		d.Name = v
	case k == "class":
		return d.Class.set(v)
	case side == board.Host:
		return d.setHost(k, v)
	default:
		return d.setAgent(k, v)
	}
	return err
}

// setHost is set for the keys of a host.
func (d *Disk) setHost(k, v string) (err error) {
	switch k {
	case "file":
		d.File = v
	case "nbd":
		d.NBD = v
	case "nbd-export":
		if d.NBDExport = v; len(v) > nbd.MaxName {
			err = fmt.Errorf("%d bytes: up to %d are possible", len(v), nbd.MaxName)
		}
	case "ro":
		d.ReadOnly, err = parseBool(v)
	case "direct":
		d.Direct, err = parseBool(v)
	case "serial":
		if d.Serial = v; len(v) > virtio.BlkIDLen {
			err = fmt.Errorf("%q has %d bytes: %d are possible", v, len(v), virtio.BlkIDLen)
		}
	case "cache":
		if d.WriteThrough = v == "none"; !d.WriteThrough && v != "writeback" {
			err = fmt.Errorf("%q is neither none nor writeback", v)
		}
	case "queues":
		if d.Queues, err = strconv.Atoi(v); err != nil || d.Queues < 1 || d.Queues > block.MaxQueues {
			err = fmt.Errorf("%q is not a number of queues: 1 to %d", v, block.MaxQueues)
		}
	case "board":
		if d.Board, err = strconv.Atoi(v); err != nil || d.Board < 0 {
			err = fmt.Errorf("%q is no number of a board: 0 is the first one", v)
		}
	default:
		err = errors.New("no such key; a host has " + hostDiskKeys)
	}
	return err
}

// complete refuses a disk that lacks something, and gives it what follows from the rest.
func (d *Disk) complete(side board.Side) error {
	if side != board.Host {
		return d.completeAgent()
	}
	switch {
	case d.File == "" && d.NBD == "":
		return errors.New("file=PATH is missing: the image or the block device (or nbd=PATH: the socket of an NBD server)")
	case d.File != "" && d.NBD != "":
		return errors.New("file and nbd: a disk lies on one of them")
	case d.NBD != "" && d.Direct:
		return errors.New("direct: is for files; the server decides how it accesses its disk")
	case d.NBD == "" && d.NBDExport != "":
		return errors.New("nbd-export: is for nbd=PATH")
	}
	if d.Serial == "" {
		if d.Serial = d.Name; len(d.Serial) > virtio.BlkIDLen {
			d.Serial = d.Serial[:virtio.BlkIDLen]
		}
	}
	return nil
}

// checkDisks refuses disks of boards that there are not, and two of one name.
func (c *Config) checkDisks() error {
	type key struct {
		board int
		name  string
	}
	seen, count := map[key]bool{}, map[int]int{}
	for i := range c.Disks {
		d := &c.Disks[i]
		if d.Board >= len(c.Boards) {
			return Usagef("%s: there is no board %d, only %d by --board", d.text, d.Board, len(c.Boards))
		}
		if isDoor(c.Boards[d.Board]) && c.Side == board.Agent {
			return Usagef("%s: is for boards; an agent of a vhost-user back end has a network", d.text)
		}
		k := key{d.Board, d.Name}
		if seen[k] {
			return Usagef("%s: board %d has a disk of that name already", d.text, d.Board)
		}
		seen[k] = true
		if count[d.Board]++; count[d.Board] > maxDisks {
			return Usagef("%s: board %d has %d disks already, which is the most", d.text, d.Board, maxDisks)
		}
	}
	return nil
}

// planDisks is the block device's DeviceType.Plan.
func planDisks(c *Config, b int, log session.Logger) ([]Plan, error) {
	var plans []Plan
	for i := range c.Disks {
		if d := &c.Disks[i]; d.Board == b {
			plans = append(plans, &diskPlan{d, c, log})
		}
	}
	return plans, nil
}

// diskPlan is a disk as it is to be made.
type diskPlan struct {
	*Disk
	c   *Config
	log session.Logger
}

// Model implements Plan.
func (p *diskPlan) Model(number uint16) (device.Device, error) {
	be, err := p.open()
	if err != nil {
		return nil, Usagef("--disk name=%s: %w", p.Name, err)
	}
	d, err := block.New(block.Config{Name: p.Name, Number: number, Backend: be, Serial: p.Serial, WriteThrough: p.WriteThrough, Queues: p.Queues,
		Deny: p.c.Deny, Logf: func(format string, args ...interface{}) { p.log.Warn(fmt.Sprintf(format, args...)) }})
	if err != nil {
		be.Close()
		return nil, UsageError{err}
	}
	return d, nil
}

func (p *diskPlan) class() (doorbell.Class, bool) { return p.Disk.Class.class() }

// open opens what the disk lies on.
func (p *diskPlan) open() (block.Backend, error) {
	if p.NBD != "" {
		log := session.Limit(p.log) // a server may come and go
		return block.OpenNBD(block.NBDConfig{Path: p.NBD, Export: p.NBDExport, ReadOnly: p.ReadOnly, Logf: func(format string, args ...interface{}) {
			log.Warn(fmt.Sprintf(format, args...))
		}})
	}
	return block.OpenFile(block.FileConfig{Path: p.File, ReadOnly: p.ReadOnly, Direct: p.Direct})
}
