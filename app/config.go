package app

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/control/vhostuser"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
)

// Config is one end of one or several links, as an operator describes it. New gives the defaults, Parse reads flags into
// it, and what Parse accepts can be built.
type Config struct {
	Side board.Side

	Boards []string // specs; an agent has one
	Name   string   // of the first link; the others count on from it
	Nets   []Net    // the network devices
	Rngs   []Rng    // sources of entropy for boards
	Disks  []Disk   // disks for boards

	Consoles []Console // in the order of their device numbers

	Types []DeviceType // of device; New gives all that there are

	Deny virtio.Features
	Loop tunbridge.LoopConfig // how the loops wait

	MachineID string // see Identify; "": ask the machine

	Account    bool       // count the accesses across the bus
	Memory     *mmio.Kind // how memory across the bus is accessed; nil: as the board says
	Interrupts bool       // wait for doorbells; false: poll

	Beat    time.Duration // heartbeat interval
	Lost    int           // heartbeats without the other side's until the link is down
	Status  string        // path of the status socket; "": the default; "none": no socket
	Verbose bool

	// LogLost, if set, tells how many lines of the log could not be written, for the status.
	LogLost func() uint64

	// The host's.
	QueueMax uint16
	Pool     bool
	// AllowSharedGroup lets two boards of one IOMMU group be used at once.
	AllowSharedGroup bool
	DMA              host.DMAConfig

	// The agent's.
	QueueSize uint16
	Placement string
	Ring      string
	RXBuffer  uint32

	one   Net             // what the flags say of a device; the defaults of --net
	specs []string        // of --net
	given map[string]bool // flags that were given

	machine *Machine // nil: not asked for yet
}

// Net is one device as an operator describes it.
type Net struct {
	Name     string // of the interface; "": the kernel picks
	Type     tunbridge.LinkType
	Addrs    []netip.Prefix
	MTU      int           // bytes; 0: 1500 at the host, the host's at the agent
	MAC      tunbridge.MAC // zero: made by Machine.MAC at the host, the host's choice at the agent
	BoardMAC tunbridge.MAC // the host's only: what the board's interface is given; zero: made by Machine.MAC
	Offload  bool
	Persist  bool
	Queues   int // pairs; 0: the default
	Class    Class
	Board    int // which of the boards it is for
}

// Class is how urgent a device is, as an operator says.
type Class struct {
	is     doorbell.Class
	chosen bool // else it is that of the device's type
}

func (c *Class) set(v string) (err error) {
	c.is, err = doorbell.ParseClass(v)
	c.chosen = err == nil
	return err
}

// class implements classed.
func (c *Class) class() (doorbell.Class, bool) { return c.is, c.chosen }

// New returns the configuration of a side with all defaults.
func New(side board.Side) *Config {
	return &Config{Side: side, Types: deviceTypes, Name: "board0", Account: true, Interrupts: true, Beat: session.Beat, Lost: 10,
		QueueMax: 1024, Pool: true, QueueSize: 256, Placement: "auto", Ring: "auto",
		one: Net{Offload: true}, given: map[string]bool{}}
}

// netKeys are the keys of --net.
const netKeys = "name link addr mtu mac board-mac offload persist queues class board"

// set gives one property of a device, by its key in --net.
func (n *Net) set(k, v string) (err error) {
	switch k {
	case "name":
		if v == "" {
			return errors.New("the name is empty: leave it out, and the kernel picks one")
		}
		n.Name = v
	case "link":
		switch v {
		case "tap":
			n.Type = tunbridge.TAP
		case "tun":
			n.Type = tunbridge.TUN
		default:
			return fmt.Errorf("%q is neither tap nor tun", v)
		}
	case "addr":
		p, err := netip.ParsePrefix(v)
		if err != nil {
			return fmt.Errorf("%q is not an address with its prefix length, e.g. 10.0.0.1/24 or fd00::1/64", v)
		}
		n.Addrs = append(n.Addrs, p)
	case "mtu":
		if n.MTU, err = strconv.Atoi(v); err != nil {
			return fmt.Errorf("%q is not a number of bytes", v)
		}
		if most := tunbridge.MaxMTU(tunbridge.TUN); n.MTU < tunbridge.MinMTU || n.MTU > most {
			return fmt.Errorf("%d bytes are out of bounds: %d to %d (of a tap %d)", n.MTU, tunbridge.MinMTU, most, tunbridge.MaxMTU(tunbridge.TAP))
		}
	case "mac":
		err = n.MAC.UnmarshalText([]byte(v))
	case "board-mac":
		err = n.BoardMAC.UnmarshalText([]byte(v))
	case "offload":
		n.Offload, err = parseBool(v)
	case "persist":
		n.Persist, err = parseBool(v)
	case "queues":
		if n.Queues, err = strconv.Atoi(v); err != nil || n.Queues < 1 || n.Queues > tunbridge.MaxQueues {
			return fmt.Errorf("%q is not a number of queue pairs: 1 to %d", v, tunbridge.MaxQueues)
		}
	case "class":
		err = n.Class.set(v)
	case "board":
		if n.Board, err = strconv.Atoi(v); err != nil {
			return fmt.Errorf("%q is not a number of a board: 0 is the first one", v)
		}
	default:
		err = errors.New("no such key; there are " + netKeys)
	}
	return err
}

func parseBool(v string) (bool, error) {
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, fmt.Errorf("%q is neither true nor false", v)
	}
	return b, nil
}

// finish checks what depends on several flags, and makes the devices.
func (c *Config) finish() error {
	if err := c.checkBoards(); err != nil {
		return err
	}
	if c.Ring == "packed" {
		if c.Placement == "push" {
			return Usagef("--ring packed: not with --placement push (both sides write the one ring, and one of them would read it across the bus)")
		}
		c.Placement = "window"
	}
	if err := c.makeNets(); err != nil {
		return err
	}
	if err := c.checkDoors(); err != nil {
		return err
	}
	if err := c.checkRngs(); err != nil {
		return err
	}
	if err := c.checkDisks(); err != nil {
		return err
	}
	if err := c.checkConsoles(); err != nil {
		return err
	}
	for i := range c.Nets {
		if err := c.Nets[i].check(); err != nil {
			if len(c.specs) > 0 {
				return Usagef("--net %s: %v", c.specs[i], err)
			}
			return Usagef("--%v", err)
		}
	}
	return nil
}

func (c *Config) checkBoards() error {
	var kinds []string
	known := map[string]bool{}
	for _, k := range board.Kinds() {
		kinds = append(kinds, k.Name)
		known[k.Name] = true
	}
	kinds = append(kinds, strings.TrimSuffix(vhostuser.Prefix, ":"))
	if len(c.Boards) == 0 {
		return Usagef("--board KIND:ARG is missing: the board; the kinds are: %s", strings.Join(kinds, " "))
	}
	seen := map[string]bool{}
	for _, spec := range c.Boards {
		i := strings.IndexByte(spec, ':')
		if !isDoor(spec) && (i < 0 || !known[spec[:i]]) {
			return Usagef("--board %s: it is KIND:ARG, and the kinds of board are: %s", spec, strings.Join(kinds, " "))
		}
		if seen[spec] {
			return Usagef("--board %s: is given twice", spec)
		}
		seen[spec] = true
	}
	if c.Side == board.Agent && len(c.Boards) > 1 {
		return Usagef("--board: an agent has one board, %d are given", len(c.Boards))
	}
	return nil
}

// ofOne are flags that describe one device, and make no sense as the default of several.
var ofOne = []string{"interface", "addr", "mac", "board-mac"}

// makeNets makes the devices: those of --net, else one for each board.
func (c *Config) makeNets() error {
	for _, name := range ofOne {
		switch {
		case !c.given[name]:
		case len(c.specs) > 0:
			key := name
			if name == "interface" {
				key = "name"
			}
			return Usagef("--%s: is for one device: beside --net write it as --net %s=...", name, key)
		case len(c.Boards) > 1:
			return Usagef("--%s: is for one board: with several, describe each device by --net board=N,...", name)
		}
	}
	c.Nets = nil
	if len(c.specs) == 0 {
		for b := range c.Boards {
			if c.others(b) > 0 {
				continue
			}
			n := c.one
			n.Board = b
			c.Nets = append(c.Nets, n)
		}
		return nil
	}
	seen := map[string]bool{}
	has := map[int]bool{}
	for _, text := range c.specs {
		n := c.one
		for _, kv := range strings.Split(text, ",") {
			i := strings.IndexByte(kv, '=')
			if i < 0 {
				return Usagef("--net %s: %q is not KEY=VALUE", text, kv)
			}
			if err := n.set(kv[:i], kv[i+1:]); err != nil {
				return Usagef("--net %s: %s: %v", text, kv[:i], err)
			}
			if kv[:i] == "board-mac" && c.Side == board.Agent {
				return Usagef("--net %s: board-mac: the host gives it; an agent's own is mac", text)
			}
		}
		if n.Name != "" && seen[n.Name] {
			return Usagef("--net %s: two devices with the interface %s", text, n.Name)
		}
		seen[n.Name] = true
		if n.Board < 0 || n.Board >= len(c.Boards) {
			return Usagef("--net %s: there is no board %d, only %d by --board", text, n.Board, len(c.Boards))
		}
		has[n.Board] = true
		c.Nets = append(c.Nets, n)
	}
	for b, name := range c.Boards {
		if !has[b] && c.others(b) == 0 {
			return Usagef("--board %s has no device: give it one by --net board=%d,...", name, b)
		}
	}
	return nil
}

// check refuses a device that cannot be, before anything is opened.
func (n *Net) check() error {
	if most := tunbridge.MaxMTU(n.Type); n.MTU > most {
		return fmt.Errorf("mtu %d: a %v takes %d to %d", n.MTU, n.Type, tunbridge.MinMTU, most)
	}
	for _, m := range []struct {
		key string
		mac tunbridge.MAC
	}{{"mac", n.MAC}, {"board-mac", n.BoardMAC}} {
		if m.mac != (tunbridge.MAC{}) && n.Type == tunbridge.TUN {
			return fmt.Errorf("%s %v: a tun has no MAC address", m.key, m.mac)
		}
	}
	return nil
}

// LinkName returns the name of board n's link: board0, board1, ...
func (c *Config) LinkName(n int) string {
	if n == 0 {
		return c.Name
	}
	stem := strings.TrimRight(c.Name, "0123456789")
	first, err := strconv.Atoi(c.Name[len(stem):])
	if err != nil {
		return c.Name + "-" + strconv.Itoa(n)
	}
	return stem + strconv.Itoa(first+n)
}
