package app

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/device/console"
	"github.com/boardlink/boardlink/device/entropy"
	entropydrv "github.com/boardlink/boardlink/driver/entropy"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
)

// Flag is one flag of boardlink host and agent, and of the lean programs.
type Flag struct {
	Name  string
	Short string // one letter, or ""
	Arg   string // what stands for its value in the help; "" for a switch
	Def   string // its default, as the help has it; "" where Help says it
	Help  string
	sides []board.Side // nil: both
	set   func(c *Config, v string) error
}

// ErrHelp is what Parse returns for --help.
var ErrHelp = errors.New("help is asked for")

var hostOnly, agentOnly = []board.Side{board.Host}, []board.Side{board.Agent}

// of returns a flag's set for a property of the device.
func of(key string) func(c *Config, v string) error {
	return func(c *Config, v string) error { return c.one.set(key, v) }
}

// choice returns a flag's set for one of several words.
func choice(to func(c *Config) *string, words ...string) func(c *Config, v string) error {
	return func(c *Config, v string) error {
		for _, w := range words {
			if v == w {
				*to(c) = v
				return nil
			}
		}
		return fmt.Errorf("%q: %s is wanted", v, strings.Join(words[:len(words)-1], ", ")+" or "+words[len(words)-1])
	}
}

// onOff returns a flag's set for a switch.
func onOff(to func(c *Config) *bool) func(c *Config, v string) error {
	return func(c *Config, v string) (err error) {
		*to(c), err = parseBool(v)
		return err
	}
}

// queueSize reads the size of a queue.
func queueSize(to func(c *Config) *uint16) func(c *Config, v string) error {
	return func(c *Config, v string) error {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil || n < 2 || n > 32768 || n&(n-1) != 0 {
			return fmt.Errorf("%q: a power of two from 2 to 32768 is wanted", v)
		}
		*to(c) = uint16(n)
		return nil
	}
}

// flags are all there are, in the order of the help.
var flags = []Flag{
	{Name: "board", Arg: "KIND:ARG", sides: hostOnly, Help: "The board, e.g. loopback:/run/a.sock, or a vhost-user front end in its place: vhost-user:/run/x.sock, with ,client ,mode=0660 ,queues=N ,slots=off or ,status=off behind it. It may come later. May be repeated.",
		set: func(c *Config, v string) error { c.Boards = append(c.Boards, v); return nil }},
	{Name: "board", Arg: "KIND:ARG", sides: agentOnly, Help: "The board, e.g. loopback:/run/a.sock, or a vhost-user back end in the host's place: vhost-user:/run/y.sock (,server ,mode=0660 may follow). It may come later.",
		set: func(c *Config, v string) error { c.Boards = append(c.Boards, v); return nil }},
	{Name: "name", Arg: "NAME", Def: "board0", sides: hostOnly, Help: "Name of the link, for log, status and stable MAC addresses. With several boards the next ones count on from it.",
		set: func(c *Config, v string) error { c.Name = v; return nil }},
	{Name: "name", Arg: "NAME", Def: "board0", sides: agentOnly, Help: "Name of the link, for log and status.",
		set: func(c *Config, v string) error { c.Name = v; return nil }},
	{Name: "interface", Short: "i", Arg: "NAME", Help: "Interface to make, or to attach to where it persists (default: the kernel picks).", set: of("name")},
	{Name: "link", Arg: "tap|tun", Def: "tap", Help: "tap: Ethernet frames. tun: raw IP packets; both ends have to say so.", set: of("link")},
	{Name: "addr", Arg: "PREFIX", Help: "Address of the interface, e.g. 10.0.0.1/24 or fd00::1/64; may be repeated.",
		set: func(c *Config, v string) error {
			for _, p := range strings.Split(v, ",") {
				if err := c.one.set("addr", p); err != nil {
					return err
				}
			}
			return nil
		}},
	{Name: "mtu", Arg: "BYTES", Help: "MTU (default: 1500 at the host; what the host says at the agent, which may lower it; an interface that somebody else made keeps its MTU at the host, and a smaller one at the agent).", set: of("mtu")},
	{Name: "mac", Arg: "MAC", sides: hostOnly, Help: "MAC address of the interface (default: one that stays the same for machine, slot and --name).", set: of("mac")},
	{Name: "mac", Arg: "MAC", sides: agentOnly, Help: "MAC address of the interface (default: what the host gives).", set: of("mac")},
	{Name: "board-mac", Arg: "MAC", sides: hostOnly, Help: "MAC address that the board's interface is given (default: one that stays the same for machine, slot and --name).", set: of("board-mac")},
	{Name: "offload", Def: "on", Help: "Leave checksums and segmentation to the other side where the kernel can.", set: of("offload")},
	{Name: "persist", Help: "Keep the interface, with its addresses, when this program ends.", set: of("persist")},
	{Name: "queues", Arg: "N", Help: fmt.Sprintf("Queue pairs of a device, 1 to %d, each with a loop and a queue of the interface of its own (default: 1 at the host; at the agent as many as the host offers, its processors at most).", tunbridge.MaxQueues),
		set: of("queues")},
	{Name: "class", Arg: "CLASS", Help: "How urgent a device is where several share a doorbell (control, interactive, bulk): who is more urgent is rung first (default: interactive; of other devices: consoles control, disks and --rng bulk).", set: of("class")},
	{Name: "deny", Arg: "FEATURES", Help: "Virtio features not to negotiate, e.g. event_idx,host_uso.", set: deny},
	{Name: "net", Arg: "SPEC", Help: "Several devices: one SPEC each, e.g. name=bl0,addr=10.0.0.1/24,mtu=9000. Keys: " + netKeys + " (its number, from 0); --link, --mtu, --offload, --persist and --queues give the defaults.",
		set: func(c *Config, v string) error { c.specs = append(c.specs, v); return nil }},
	{Name: "console", Arg: "SPEC", sides: hostOnly, Help: fmt.Sprintf("A console for the board, e.g. name=con0,log=/var/log/con0.log: boardlink console con0 attaches a terminal. Keys: name, log=FILE (what the board prints is added to it), scrollback=BYTES (what is kept in memory, %dK by default), pty=PATH (a link to a pseudo-terminal, for picocom, screen, conserver), class, board (its number, from 0). May be repeated.", console.DefaultScrollback>>10), set: setConsole},
	{Name: "console", Arg: "SPEC", sides: agentOnly, Help: "What a console of the host is joined to here: name=con0 and one of pty=PATH (a link to a pseudo-terminal for programs of this machine), kmsg (the kernel's log, one way) and, as the last key, exec=COMMAND (a program on a terminal, e.g. exec=/sbin/agetty -L 115200 %t vt220, started again when it ends; %t is the terminal's name). May be repeated: both ends count in this order.", set: setConsole},
	{Name: "rng", sides: hostOnly, Help: fmt.Sprintf("Offer random bytes of this machine to the board. --rng=rate=BYTES limits what a board gets each second (default: %dK), --rng=board=N (its number, from 0) is for one of several boards.", entropy.DefaultRate>>10), set: setRng},
	{Name: "rng", sides: agentOnly, Help: fmt.Sprintf("Mix random bytes that the host offers into the kernel's generator, %d at the start and after each minute. --rng=credit=BITS counts each byte for 1 to 8 bits of entropy, which needs root (default: 0, mixed in and counted for nothing), every=DURATION sets the time between.", entropydrv.Request), set: setRng},
	{Name: "disk", Arg: "SPEC", sides: hostOnly, Help: "Offer a disk to the board, e.g. name=root,file=/srv/root.img; may be repeated. file is an image or a block device, which nobody else may write; nbd=PATH in its place is the socket of an NBD server (nbd-export=NAME its export). Further keys: ro, serial=TEXT (default: the name), cache=none (a write ends on stable storage) or writeback (the default: a flush does), direct (passes the page cache by), queues=N, board=N (its number, from 0), class=CLASS (see --class).", set: setDisk},
	{Name: "disk", Arg: "SPEC", sides: agentOnly, Help: "Use a disk of the host, the first one by the first --disk: e.g. name=root,export=/run/boardlink/root.sock serves it by NBD on a socket (qemu-img, nbd-client -unix, fio: nbd+unix:///root?socket=PATH). Further keys: queues=N (default: 1), class=CLASS (see --class).", set: setDisk},
	{Name: "machine-id", Arg: "TEXT", sides: hostOnly, Help: "Identity of this machine, which MAC addresses are made of (default: " + MachineIDEnv + " of the environment, /etc/machine-id, or what the firmware says).",
		set: func(c *Config, v string) error { c.MachineID = v; return nil }},
	{Name: "busy-poll", Arg: "DURATION", Def: "auto", Help: "How long a loop with nothing to do busy-polls before it sleeps: auto (as long as has paid off lately, never across the bus), off, or e.g. 50us.",
		set: func(c *Config, v string) error { return c.Loop.SetBusyPoll(v) }},
	{Name: "cpu", Arg: "LIST", Help: "Processors to lock the loops to, e.g. 1 or 2-5: one each, counting round (default: none).",
		set: func(c *Config, v string) error { return c.Loop.SetCPU(v) }},
	{Name: "account", Def: "on", Help: "Count the accesses across the bus.", set: onOff(func(c *Config) *bool { return &c.Account })},
	{Name: "memory", Arg: "KIND", Def: "auto", Help: "How memory across the bus is accessed (auto, cached, write-combining, uncached); for trials of the device-memory paths on RAM.", set: memory},
	{Name: "interrupts", Def: "on", Help: "Wait for doorbells; without, poll.", set: onOff(func(c *Config) *bool { return &c.Interrupts })},
	{Name: "beat", Arg: "DURATION", Def: "100ms", Help: "Heartbeat interval, 1ms to 1m.",
		set: func(c *Config, v string) (err error) {
			if c.Beat, err = time.ParseDuration(v); err != nil || c.Beat < time.Millisecond || c.Beat > time.Minute {
				return fmt.Errorf("%q: 1ms to 1m is possible", v)
			}
			return nil
		}},
	{Name: "lost", Arg: "BEATS", Def: "10", Help: "Heartbeats without the other side's until the link is down, 2 or more.",
		set: func(c *Config, v string) (err error) {
			if c.Lost, err = strconv.Atoi(v); err != nil || c.Lost < 2 || c.Lost > math.MaxInt32 {
				return fmt.Errorf("%q: a number of heartbeats is wanted, at least 2", v)
			}
			return nil
		}},
	{Name: "status", Arg: "PATH", Help: "Status socket, for boardlink status (none for no socket; default: SIDE-NAME.sock in /run/boardlink, or in the user's runtime directory).",
		set: func(c *Config, v string) error { c.Status = v; return nil }},
	{Name: "queue-max", Arg: "N", Def: "1024", sides: hostOnly, Help: "Largest queue size, a power of two.", set: queueSize(func(c *Config) *uint16 { return &c.QueueMax })},
	{Name: "pool", Def: "on", sides: hostOnly, Help: "Let the board reach host memory where it can (placement push).", set: onOff(func(c *Config) *bool { return &c.Pool })},
	{Name: "allow-shared-group", sides: hostOnly, Help: "Let two boards of one IOMMU group be used at once. Each of them can then reach the host memory that is meant for the other.", set: onOff(func(c *Config) *bool { return &c.AllowSharedGroup })},
	{Name: "dma", Arg: "MODE", Def: "auto", sides: hostOnly, Help: "What the board's DMA engine is for (auto, off, on), where this program can drive one: auto, what the board sends, where that is faster; on, both ways, however fast it is.",
		set: func(c *Config, v string) (err error) { c.DMA.Mode, err = host.ParseDMAMode(v); return err }},
	{Name: "dma-min", Arg: "BYTES", sides: hostOnly, Help: "Length below which the processor copies, not the DMA engine (default: measured at start).",
		set: func(c *Config, v string) error {
			n, err := strconv.ParseUint(v, 10, 32)
			if err != nil {
				return fmt.Errorf("%q: a number of bytes up to 4294967295 is wanted", v)
			}
			c.DMA.Min = uint32(n)
			return nil
		}},
	{Name: "queue-size", Arg: "N", Def: "256", sides: agentOnly, Help: "Queue size, a power of two; the host may ask for less.", set: queueSize(func(c *Config) *uint16 { return &c.QueueSize })},
	{Name: "placement", Arg: "WHERE", Def: "auto", sides: agentOnly, Help: "Where rings and buffers lie (auto, window, push): window, all in the board's memory; push, each where its reader is; auto, push where the host offers memory for it.",
		set: choice(func(c *Config) *string { return &c.Placement }, "auto", "window", "push")},
	{Name: "ring", Arg: "KIND", Def: "auto", sides: agentOnly, Help: "Kind of virtqueue (auto, split, packed): packed goes with placement window only; auto, split.",
		set: choice(func(c *Config) *string { return &c.Ring }, "auto", "split", "packed")},
	{Name: "rx-buffer", Arg: "BYTES", sides: agentOnly, Help: "Size of a receive buffer (default: by the window, 16384 at most).",
		set: func(c *Config, v string) error {
			n, err := strconv.ParseUint(v, 10, 32)
			if err != nil || n < 256 || n > 1<<20 {
				return fmt.Errorf("%q: 256 to 1048576 bytes are possible", v)
			}
			c.RXBuffer = uint32(n)
			return nil
		}},
	{Name: "verbose", Short: "v", Help: "Log more.", set: onOff(func(c *Config) *bool { return &c.Verbose })},
}

func deny(c *Config, v string) error {
	for _, name := range strings.Split(v, ",") {
		b, err := virtio.ParseFeature(strings.TrimSpace(name))
		if err != nil {
			return err
		}
		switch b {
		case virtio.Version1:
			return fmt.Errorf("%s: there is no link without it", name)
		case virtio.NetRawIP:
			return fmt.Errorf("%s: it follows --link", name)
		}
		c.Deny.Set(b)
	}
	return nil
}

func memory(c *Config, v string) error {
	if v == "auto" {
		c.Memory = nil
		return nil
	}
	for _, k := range []mmio.Kind{mmio.Cached, mmio.WriteCombining, mmio.Uncached} {
		if k := k; v == k.String() {
			c.Memory = &k
			return nil
		}
	}
	return fmt.Errorf("%q: auto, cached, write-combining or uncached is wanted", v)
}

// Flags returns the flags of a side, in the order of the help.
func Flags(side board.Side) []Flag {
	var fs []Flag
	for _, f := range flags {
		if f.sides == nil || f.sides[0] == side {
			fs = append(fs, f)
		}
	}
	return fs
}

// find returns the flag of an argument without its value, as "--mtu", "-mtu", "-i", "--no-offload". off: the switch is
// turned off by its name.
func (c *Config) find(arg string) (f *Flag, off bool) {
	name := strings.TrimPrefix(arg[1:], "-")
	short := len(arg) == 2
	for i := range flags {
		f := &flags[i]
		switch {
		case f.sides != nil && f.sides[0] != c.Side:
		case short && f.Short == name, !short && f.Name == name:
			return f, false
		case !short && f.Arg == "" && "no-"+f.Name == name:
			return f, true
		}
	}
	return nil, false
}

// Parse reads a command line into c and checks it. Errors are the user's, in one line; ErrHelp asks for the help.
//
// A value follows its flag (--mtu 1400) or an equals sign (--mtu=1400). A switch is turned on by --offload, off by
// --no-offload or --offload=false. Of a flag that comes twice the last one counts, unless it may be repeated.
func (c *Config) Parse(args []string) error {
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		if len(arg) < 2 || arg[0] != '-' || arg == "--" {
			return Usagef("unexpected argument %q: flags begin with --", arg)
		}
		value, has := "", false
		if i := strings.IndexByte(arg, '='); i > 0 {
			arg, value, has = arg[:i], arg[i+1:], true
		}
		if arg == "--help" || arg == "-help" || arg == "-h" {
			return ErrHelp
		}
		f, off := c.find(arg)
		if f == nil && len(arg) > 2 && arg[1] != '-' && !has { // -ieth0
			if g, _ := c.find(arg[:2]); g != nil && g.Arg != "" {
				f, value, has = g, arg[2:], true
			}
		}
		switch {
		case f == nil:
			return Usagef("unknown flag %s%s", arg, c.otherSide(arg))
		case off && has:
			return Usagef("%s=%s: it has no value", arg, value)
		case off:
			value = "false"
		case f.Arg == "" && !has:
			value = "true"
		case !has:
			if len(args) == 0 {
				return Usagef("--%s: its value is missing: %s", f.Name, f.Arg)
			}
			if strings.HasPrefix(args[0], "--") {
				if g, _ := c.find(strings.SplitN(args[0], "=", 2)[0]); g != nil {
					return Usagef("--%s: its value is missing: %s (%s is a flag)", f.Name, f.Arg, args[0])
				}
			}
			value, args = args[0], args[1:]
		}
		if value == "" {
			return Usagef("--%s: must not be empty; leave it out for the default", f.Name)
		}
		if err := f.set(c, value); err != nil {
			return Usagef("--%s: %v", f.Name, err)
		}
		c.given[f.Name] = true
	}
	return c.finish()
}

// otherSide says where a flag that is unknown here belongs to.
func (c *Config) otherSide(arg string) string {
	o := &Config{Side: board.Host}
	if c.Side == board.Host {
		o.Side = board.Agent
	}
	if f, _ := o.find(arg); f != nil {
		return fmt.Sprintf(": it is the %s's", o.Side)
	}
	return ""
}

// WriteHelp writes the help of a side's program, in lines of 80 characters, or as many as the variable COLUMNS says.
func WriteHelp(w io.Writer, side board.Side, program string) error {
	width, err := strconv.Atoi(os.Getenv("COLUMNS"))
	if err != nil || width < 60 {
		width = 80
	}
	what := "The carrier's end: offers network devices to a board."
	if side == board.Agent {
		what = "The board's end: drives the devices that the host offers."
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: %s --board=KIND:ARG [flags]\n\n%s\n\nFlags:\n", program, what)
	const indent = 26
	for _, f := range append([]Flag{{Name: "help", Short: "h", Help: "Show this help."}}, Flags(side)...) {
		head := "      --"
		if f.Short != "" {
			head = "  -" + f.Short + ", --"
		}
		help := f.Help
		if f.Arg == "" && f.Def == "on" {
			head += "[no-]" + f.Name
		} else {
			head += f.Name
		}
		if f.Arg != "" {
			head += "=" + f.Arg
		}
		if f.Def != "" && f.Def != "on" {
			help = strings.TrimSuffix(help, ".") + " (default: " + f.Def + ")."
		}
		if len(head) > indent-2 {
			b.WriteString(head + "\n")
			head = ""
		}
		b.WriteString(head + strings.Repeat(" ", indent-len(head)))
		col := indent
		for i, word := range strings.Fields(help) {
			if i > 0 && col+1+len(word) > width {
				b.WriteString("\n" + strings.Repeat(" ", indent))
				col = indent
			} else if i > 0 {
				b.WriteByte(' ')
				col++
			}
			b.WriteString(word)
			col += len(word)
		}
		b.WriteByte('\n')
	}
	_, err = io.WriteString(w, b.String())
	return err
}
