// Package lean is what boardlink-agent and boardlink-host have in common: the two ends as small programs for
// machines that only gccgo compiles for (32-bit PowerPC, 64-bit PowerPC below POWER8), or that have no room for
// more.
//
// In the room: flags as those of `boardlink agent` and `boardlink host`, the log, the status socket. Never in it:
// how ends work; anything beyond Go 1.18 without generics, the standard library and
// golang.org/x/sys/unix, or the http, template and reflection-driven packages that make a program large.
package lean

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/cmd/internal/ifaddr"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
)

// Version is what status tells of the program; the linker may set it:
// -ldflags '-X github.com/boardlink/boardlink/cmd/internal/lean.Version=...'.
var Version = "(devel)"

// Exit statuses, as those of boardlink: 2 is what was typed or how the machine is set up, 1 is
// ours.
const (
	exitOK    = 0
	exitFail  = 1
	exitUsage = 2
)

// usageError is the user's fault, in one line.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// Usagef returns an error that ends the program with status 2.
func Usagef(format string, args ...interface{}) error { return usageError{fmt.Errorf(format, args...)} }

// Flags are common to both ends. The words are those of boardlink host and boardlink agent.
type Flags struct {
	Set  *flag.FlagSet
	Side board.Side
	Log  *Log

	Board, Name string
	Beat        time.Duration
	Lost        int
	Account     bool
	Interrupts  bool
	Loop        tunbridge.LoopConfig // how the loops wait, by Parse

	memory, status, deny string
	busyPoll, cpu        string
	machineID            string
	verbose              bool
	def                  Net
	defLink              string
	defAddr, nets        list
	out                  io.Writer
}

// list is a flag that may be repeated.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// macFlag is a MAC address as a flag; the zero value is no address.
type macFlag tunbridge.MAC

func (m *macFlag) String() string { return tunbridge.MAC(*m).String() }
func (m *macFlag) Set(s string) error {
	var a tunbridge.MAC
	err := a.UnmarshalText([]byte(s))
	if err == nil {
		*m = macFlag(a)
	}
	return err
}

// New returns the flags of one side's program. The caller adds its own to Set before Parse.
func New(side board.Side) *Flags {
	f := &Flags{Set: flag.NewFlagSet("boardlink-"+side.String(), flag.ContinueOnError), Side: side, out: os.Stderr}
	s := f.Set
	s.StringVar(&f.Board, "board", "", "the board, `KIND:ARG`, e.g. loopback:/run/a.sock; it may come later")
	s.StringVar(&f.Name, "name", "board0", "name of the link, for log, status and stable MAC addresses")
	s.StringVar(&f.def.Name, "interface", "", "interface to make, or to attach to where it persists (default: the kernel picks)")
	s.StringVar(&f.def.Name, "i", "", "short for --interface")
	s.StringVar(&f.defLink, "link", "tap", "tap: Ethernet frames; tun: raw IP packets, both ends have to say so")
	s.Var(&f.defAddr, "addr", "address of the interface, a `PREFIX` like 10.0.0.1/24; may be repeated")
	s.IntVar(&f.def.MTU, "mtu", 0, "MTU in bytes (default: 1500 at the host; what the host says at the agent)")
	s.Var((*macFlag)(&f.def.MAC), "mac", "`MAC` address of the interface")
	s.BoolVar(&f.def.Offload, "offload", true, "leave checksums and segmentation to the other side where the kernel can")
	s.BoolVar(&f.def.Persist, "persist", false, "keep the interface, with its addresses, when this program ends")
	s.IntVar(&f.def.Queues, "queues", 0, fmt.Sprintf("queue pairs of a device, 1 to %d (default: 1 at the host; at the agent as many as the host offers, its processors at most)", tunbridge.MaxQueues))
	s.StringVar(&f.busyPoll, "busy-poll", "auto", "how long a loop with nothing to do looks on before it sleeps: auto (as long as has paid off lately, never across the bus), off, or a `DURATION` like 50us")
	s.StringVar(&f.cpu, "cpu", "", "processors to lock the loops to, a `LIST` like 1 or 2-5: one each, counting round (default: none)")
	s.StringVar(&f.deny, "deny", "", "virtio `features` not to negotiate, e.g. event_idx,host_uso")
	s.Var(&f.nets, "net", "several devices: one `SPEC` each, e.g. name=bl0,addr=10.0.0.1/24,mtu=9000; keys: name link addr mtu mac board-mac offload persist queues")
	s.StringVar(&f.machineID, "machine-id", "", "identity of this machine, which MAC addresses are made of (default: BOARDLINK_MACHINE_ID of the environment, /etc/machine-id, or what the firmware says)")
	s.BoolVar(&f.Account, "account", true, "count the accesses across the bus")
	s.BoolVar(&f.Interrupts, "interrupts", true, "wait for the board's interrupts; without, everything is polled")
	s.StringVar(&f.memory, "memory", "auto", "how memory across the bus is accessed: auto, cached, write-combining, uncached")
	s.DurationVar(&f.Beat, "beat", session.Beat, "heartbeat interval")
	s.IntVar(&f.Lost, "lost", 10, "heartbeats without the other side's until the link is down")
	s.StringVar(&f.status, "status", "", "`PATH` of the status socket, for boardlink status (default: no socket)")
	s.BoolVar(&f.verbose, "v", false, "log more")
	s.SetOutput(f.out)
	return f
}

// Parse reads the command line and checks what does not depend on the machine.
func (f *Flags) Parse(args []string) error {
	if err := f.Set.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return usageError{err}
	}
	f.Log = &Log{w: f.out, debug: f.verbose}
	if err := f.Loop.SetBusyPoll(f.busyPoll); err != nil {
		return Usagef("--busy-poll: %v", err)
	}
	if err := f.Loop.SetCPU(f.cpu); err != nil {
		return Usagef("--cpu: %v", err)
	}
	switch {
	case f.Set.NArg() > 0:
		return Usagef("unexpected argument %q", f.Set.Arg(0))
	case !strings.Contains(f.Board, ":"):
		var kinds []string
		for _, k := range board.Kinds() {
			kinds = append(kinds, k.Name+":...")
		}
		return Usagef("--board %q: KIND:ARG is needed; kinds: %s", f.Board, strings.Join(kinds, " "))
	case f.Name == "":
		return Usagef("--name: must not be empty")
	case f.Beat < time.Millisecond || f.Beat > time.Minute:
		return Usagef("--beat %v: 1ms to 1m are possible", f.Beat)
	case f.def.Queues < 0 || f.def.Queues > tunbridge.MaxQueues:
		return Usagef("--queues %d: 1 to %d", f.def.Queues, tunbridge.MaxQueues)
	case f.Lost < 2:
		return Usagef("--lost %d: at least 2", f.Lost)
	}
	return nil
}

// Net is one device as the flags describe it.
type Net struct {
	Name     string // of the interface
	Type     tunbridge.LinkType
	Addrs    []netip.Prefix
	MTU      int
	MAC      tunbridge.MAC
	BoardMAC tunbridge.MAC // the host's only: what the board's interface is given
	Offload  bool
	Persist  bool
	Queues   int // pairs; 0: the default
}

// Nets returns the devices: those of --net, else the one that the other flags describe.
func (f *Flags) Nets() ([]Net, error) {
	def := f.def
	if err := def.set("link", f.defLink); err != nil {
		return nil, Usagef("--link: %v", err)
	}
	if len(f.nets) == 0 {
		for _, a := range f.defAddr {
			if err := def.set("addr", a); err != nil {
				return nil, Usagef("--addr: %v", err)
			}
		}
		return []Net{def}, nil
	}
	var out []Net
	seen := map[string]bool{}
	for _, text := range f.nets {
		n := def
		for _, kv := range strings.Split(text, ",") {
			i := strings.IndexByte(kv, '=')
			if i < 0 {
				return nil, Usagef("--net %s: %q is not KEY=VALUE", text, kv)
			}
			if err := n.set(kv[:i], kv[i+1:]); err != nil {
				return nil, Usagef("--net %s: %s: %v", text, kv[:i], err)
			}
		}
		if n.Name != "" && seen[n.Name] {
			return nil, Usagef("--net %s: two devices with the interface %s", text, n.Name)
		}
		seen[n.Name] = true
		out = append(out, n)
	}
	return out, nil
}

func (n *Net) set(k, v string) (err error) {
	switch k {
	case "name":
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
		var p netip.Prefix
		if p, err = netip.ParsePrefix(v); err == nil {
			n.Addrs = append(n.Addrs, p)
		}
	case "mtu":
		n.MTU, err = strconv.Atoi(v)
	case "mac":
		err = n.MAC.UnmarshalText([]byte(v))
	case "board-mac":
		err = n.BoardMAC.UnmarshalText([]byte(v))
	case "offload":
		n.Offload, err = strconv.ParseBool(v)
	case "persist":
		n.Persist, err = strconv.ParseBool(v)
	case "queues":
		if n.Queues, err = strconv.Atoi(v); err != nil || n.Queues < 1 || n.Queues > tunbridge.MaxQueues {
			return fmt.Errorf("%q is no number of queue pairs: 1 to %d", v, tunbridge.MaxQueues)
		}
	default:
		err = errors.New("no such key; there are name link addr mtu mac board-mac offload persist queues")
	}
	return err
}

// Interface returns the device's own end.
func (n *Net) Interface() tunbridge.Config {
	return tunbridge.Config{Name: n.Name, Type: n.Type, Offload: n.Offload, Persist: n.Persist, MAC: n.MAC, MTU: n.MTU}
}

// StableMACs gives device number i the MAC addresses that the operator did not choose, the host's own and the board's: the
// same from start to start, and those that boardlink gives.
func (f *Flags) StableMACs(n *Net, i int) error {
	if n.Type != tunbridge.TAP || n.MAC != (tunbridge.MAC{}) && n.BoardMAC != (tunbridge.MAC{}) {
		return nil
	}
	m, err := app.Identify(f.machineID)
	if err != nil {
		return usageError{err}
	}
	if m.Warning != "" {
		f.Log.Warn(m.Warning)
	}
	if n.MAC == (tunbridge.MAC{}) {
		n.MAC = m.MAC(f.Name, board.Host, f.Board, i)
	}
	if n.BoardMAC == (tunbridge.MAC{}) {
		n.BoardMAC = m.MAC(f.Name, board.Agent, f.Board, i)
	}
	return nil
}

// Deny returns the features not to negotiate.
func (f *Flags) Deny() (virtio.Features, error) {
	var s virtio.Features
	if f.deny == "" {
		return s, nil
	}
	for _, name := range strings.Split(f.deny, ",") {
		b, err := virtio.ParseFeature(strings.TrimSpace(name))
		if err != nil {
			return s, Usagef("--deny: %v", err)
		}
		s.Set(b)
	}
	return s, nil
}

// Options returns how the board is opened.
func (f *Flags) Options() (board.Options, error) {
	o := board.Options{Logf: func(format string, args ...interface{}) { f.Log.Debug(fmt.Sprintf(format, args...)) },
		Warnf: func(format string, args ...interface{}) { f.Log.Warn(fmt.Sprintf(format, args...)) }}
	if f.Account {
		o.Account = new(dma.Account)
	}
	kinds := map[string]mmio.Kind{"cached": mmio.Cached, "write-combining": mmio.WriteCombining, "uncached": mmio.Uncached}
	if k, ok := kinds[f.memory]; ok {
		o.Kind = &k
	} else if f.memory != "auto" {
		return o, Usagef("--memory %s: auto, cached, write-combining or uncached", f.memory)
	}
	return o, nil
}

// Address sets up an interface that is open: addresses, and up.
func (f *Flags) Address(i *tunbridge.Iface, n *Net) error {
	for _, w := range i.Warnings() {
		f.Log.Warn(w, "interface", i.Name())
	}
	if err := ifaddr.Apply(i.Name(), n.Addrs); err != nil {
		return err
	}
	if err := ifaddr.Up(i.Name()); err != nil {
		return err
	}
	f.Log.Info("interface ready", "interface", i.Name(), "addresses", n.Addrs)
	return nil
}

// End is what both programs run.
type End interface {
	Run(context.Context) error
	Status() status.Link
}

// Serve runs an end until a signal, with its status socket.
func (f *Flags) Serve(e End) error {
	started := time.Now().Format(time.RFC3339)
	s, err := serveStatus(f.status, func() status.Program {
		return status.Program{Version: Version + " lean " + runtime.Version() + " " + runtime.GOARCH, Side: f.Side.String(),
			PID: os.Getpid(), Started: started, Links: []status.Link{e.Status()}}
	})
	if err != nil {
		return usageError{err}
	}
	defer s.close()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return e.Run(ctx)
}

// Exit ends the program with what its error stands for.
func (f *Flags) Exit(err error) {
	var us usageError
	var tu tunbridge.UserError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		os.Exit(exitOK)
	case errors.As(err, &us), errors.As(err, &tu), errors.Is(err, board.ErrInput), errors.Is(err, board.ErrSideTaken):
		fmt.Fprintf(f.out, "%s: %s\n", f.Set.Name(), strings.Replace(err.Error(), "\n", "; ", -1))
		os.Exit(exitUsage)
	}
	fmt.Fprintf(f.out, "%s: %s\n", f.Set.Name(), strings.Replace(err.Error(), "\n", "; ", -1))
	os.Exit(exitFail)
}
