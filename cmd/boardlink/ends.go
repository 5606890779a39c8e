package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/cmd/boardlink/internal/statusd"
	"github.com/boardlink/boardlink/cmd/internal/ifaddr"
	"github.com/boardlink/boardlink/cmd/internal/statussock"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
)

// endFlags are common to both ends.
type endFlags struct {
	Board []string `required:"" placeholder:"KIND:ARG" sep:"none" help:"The board, e.g. loopback:/run/a.sock. It may come later. A host may be given several: one that cannot be used is tried again and does not stop the others."`
	Name  string   `default:"board0" help:"Name of the link, for log, status and stable MAC addresses. With several boards the next ones count on from it."`

	Interface string        `short:"i" placeholder:"NAME" help:"Interface to make, or to attach to where it persists (default: the kernel picks)."`
	Link      string        `enum:"tap,tun" default:"tap" help:"tap: Ethernet frames. tun: raw IP packets; both ends have to say so."`
	Addr      []prefix      `placeholder:"PREFIX" help:"Address of the interface, e.g. 10.0.0.1/24 or fd00::1/64; may be repeated."`
	MTU       int           `placeholder:"BYTES" help:"MTU (default: 1500 at the host; what the host says at the agent)."`
	MAC       tunbridge.MAC `placeholder:"MAC" help:"MAC address of the interface (default: one that stays the same for --name)."`
	Offload   bool          `default:"true" negatable:"" help:"Leave checksums and segmentation to the other side where the kernel can."`
	Persist   bool          `help:"Keep the interface, with its addresses, when this program ends."`
	Queues    int           `placeholder:"N" help:"Queue pairs of a device, 1 to ${max_queues}, each with loops and a queue of the interface of its own (default: 1 at the host; at the agent as many as the host offers, its processors at most)."`
	Deny      []string      `placeholder:"FEATURE" help:"Virtio features not to negotiate, e.g. event_idx,host_uso."`
	Net       []string      `placeholder:"SPEC" sep:"none" help:"Several devices: one SPEC each, e.g. name=bl0,addr=10.0.0.1/24,mtu=9000. Keys: name link addr mtu mac board-mac offload persist queues board (its number, from 0); the flags above give the defaults."`

	BusyPoll string `default:"auto" placeholder:"DURATION" help:"How long a loop with nothing to do looks on before it sleeps: auto (as long as has paid off lately, never across the bus), off, or e.g. 50us (default: ${default})."`
	CPU      string `placeholder:"LIST" help:"Processors to lock the loops to, e.g. 1 or 2-5: one each, counting round (default: none)."`

	MachineID string `name:"machine-id" placeholder:"TEXT" help:"Identity of this machine, which MAC addresses are made of (default: BOARDLINK_MACHINE_ID of the environment, /etc/machine-id, or what the firmware says)."`

	Account bool `default:"true" negatable:"" help:"Count the accesses across the bus."`

	Memory     string `enum:"auto,cached,write-combining,uncached" default:"auto" help:"How memory across the bus is accessed (${enum}); for trials of the device-memory paths on RAM."`
	Interrupts bool   `default:"true" negatable:"" help:"Wait for doorbells; without, poll."`

	Beat   time.Duration `default:"100ms" help:"Heartbeat interval."`
	Lost   int           `default:"10" placeholder:"BEATS" help:"Heartbeats without the other side's until the link is down (default: ${default})."`
	Status string        `placeholder:"PATH" help:"Status socket (default ${status_dir}/SIDE-NAME.sock; none for no socket)."`

	Verbose bool `short:"v" help:"Log more."`

	loop    tunbridge.LoopConfig // of BusyPoll and CPU, by check
	machine *app.Machine         // nil: not asked for yet
}

// netSpec is one device as flags describe it.
type netSpec struct {
	name     string
	link     tunbridge.LinkType
	addrs    []netip.Prefix
	mtu      int
	mac      tunbridge.MAC
	boardMAC tunbridge.MAC
	offload  bool
	persist  bool
	queues   int // pairs; 0: the default
	board    int // which of the boards it is for
}

// prefix is an address with its prefix length.
type prefix netip.Prefix

// UnmarshalText implements encoding.TextUnmarshaler.
func (p *prefix) UnmarshalText(b []byte) error {
	q, err := netip.ParsePrefix(string(b))
	if err != nil {
		return fmt.Errorf("%q is no address with its prefix length, e.g. 10.0.0.1/24 or fd00::1/64", b)
	}
	*p = prefix(q)
	return nil
}

// specs returns the devices: those of --net, else the one that the other flags describe.
func (f *endFlags) specs(side board.Side, boardMAC tunbridge.MAC) ([]netSpec, error) {
	def := netSpec{name: f.Interface, mtu: f.MTU, mac: f.MAC, boardMAC: boardMAC, offload: f.Offload, persist: f.Persist, queues: f.Queues}
	if f.Link == "tun" {
		def.link = tunbridge.TUN
	}
	var out []netSpec
	if len(f.Net) == 0 {
		if len(f.Board) > 1 && (f.Interface != "" || len(f.Addr) != 0 || f.MAC != (tunbridge.MAC{}) || boardMAC != (tunbridge.MAC{})) {
			return nil, usagef("--interface, --addr and the MAC addresses are for one board: with several, describe each device by --net board=N,...")
		}
		for _, p := range f.Addr {
			def.addrs = append(def.addrs, netip.Prefix(p))
		}
		for b := range f.Board {
			s := def
			s.board = b
			out = append(out, s)
		}
		return out, nil
	}
	seen := map[string]bool{}
	for _, text := range f.Net {
		s := def
		for _, kv := range strings.Split(text, ",") {
			k, v, ok := strings.Cut(kv, "=")
			if !ok {
				return nil, usagef("--net %s: %q is not KEY=VALUE", text, kv)
			}
			if err := s.set(k, v); err != nil {
				return nil, usagef("--net %s: %s: %v", text, k, err)
			}
		}
		if s.name != "" && seen[s.name] {
			return nil, usagef("--net %s: two devices with the interface %s", text, s.name)
		}
		seen[s.name] = true
		if s.board < 0 || s.board >= len(f.Board) {
			return nil, usagef("--net %s: there is no board %d, only %d by --board", text, s.board, len(f.Board))
		}
		out = append(out, s)
	}
	for b, name := range f.Board {
		if !slices.ContainsFunc(out, func(s netSpec) bool { return s.board == b }) {
			return nil, usagef("--board %s has no device: give it one by --net board=%d,...", name, b)
		}
	}
	return out, nil
}

func (s *netSpec) set(k, v string) (err error) {
	switch k {
	case "name":
		s.name = v
	case "link":
		switch v {
		case "tap":
			s.link = tunbridge.TAP
		case "tun":
			s.link = tunbridge.TUN
		default:
			return fmt.Errorf("%q is neither tap nor tun", v)
		}
	case "addr":
		var p prefix
		if err = p.UnmarshalText([]byte(v)); err == nil {
			s.addrs = append(s.addrs, netip.Prefix(p))
		}
	case "mtu":
		if s.mtu, err = strconv.Atoi(v); err != nil {
			return fmt.Errorf("%q is no number of bytes", v)
		}
	case "mac":
		err = s.mac.UnmarshalText([]byte(v))
	case "board-mac":
		err = s.boardMAC.UnmarshalText([]byte(v))
	case "offload":
		s.offload, err = parseBool(v)
	case "persist":
		s.persist, err = parseBool(v)
	case "queues":
		if s.queues, err = strconv.Atoi(v); err != nil || s.queues < 1 || s.queues > tunbridge.MaxQueues {
			return fmt.Errorf("%q is no number of queue pairs: 1 to %d", v, tunbridge.MaxQueues)
		}
	case "board":
		s.board, err = strconv.Atoi(v)
	default:
		err = errors.New("no such key; there are name link addr mtu mac board-mac offload persist queues board")
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

// iface returns the interface of a device.
func (s netSpec) iface() tunbridge.Config {
	return tunbridge.Config{Name: s.name, Type: s.link, Offload: s.offload, Persist: s.persist, MAC: s.mac, MTU: s.mtu}
}

// stableMACs gives device n the MAC addresses that the operator did not choose, the host's own and the board's: they stay the
// same from start to start, so that neighbour tables stay true, and differ from those of other machines and boards.
func (f *endFlags) stableMACs(s *netSpec, n int, log *slog.Logger) error {
	if s.link != tunbridge.TAP || s.mac != (tunbridge.MAC{}) && s.boardMAC != (tunbridge.MAC{}) {
		return nil
	}
	if f.machine == nil {
		m, err := app.Identify(f.MachineID)
		if err != nil {
			return usageError{err}
		}
		if m.Warning != "" {
			log.Warn(m.Warning)
		}
		f.machine = &m
	}
	for _, a := range []struct {
		side board.Side
		mac  *tunbridge.MAC
	}{{board.Host, &s.mac}, {board.Agent, &s.boardMAC}} {
		if *a.mac == (tunbridge.MAC{}) {
			*a.mac = f.machine.MAC(f.linkName(s.board), a.side, f.Board[s.board], n)
		}
	}
	return nil
}

func (f *endFlags) deny() (virtio.Features, error) {
	var s virtio.Features
	for _, name := range f.Deny {
		b, err := virtio.ParseFeature(strings.TrimSpace(name))
		if err != nil {
			return s, usagef("--deny: %v", err)
		}
		switch b {
		case virtio.Version1:
			return s, usagef("--deny %s: there is no link without it", name)
		case virtio.NetRawIP:
			return s, usagef("--deny %s: it follows --link", name)
		}
		s.Set(b)
	}
	return s, nil
}

func (f *endFlags) options(log *slog.Logger) board.Options {
	o := board.Options{Logf: func(format string, args ...interface{}) {
		log.Debug(fmt.Sprintf(format, args...))
	}, Warnf: func(format string, args ...interface{}) {
		log.Warn(fmt.Sprintf(format, args...))
	}}
	if f.Account {
		o.Account = new(dma.Account)
	}
	kinds := map[string]mmio.Kind{"cached": mmio.Cached, "write-combining": mmio.WriteCombining, "uncached": mmio.Uncached}
	if k, ok := kinds[f.Memory]; ok {
		o.Kind = &k
	}
	return o
}

func (f *endFlags) check() error {
	if f.Name == "" {
		return usagef("--name: must not be empty")
	}
	if f.Beat < time.Millisecond || f.Beat > time.Minute {
		return usagef("--beat %v: 1ms to 1m are possible", f.Beat)
	}
	if f.Queues < 0 || f.Queues > tunbridge.MaxQueues {
		return usagef("--queues %d: 1 to %d", f.Queues, tunbridge.MaxQueues)
	}
	if err := f.loop.SetBusyPoll(f.BusyPoll); err != nil {
		return usagef("--busy-poll: %v", err)
	}
	if err := f.loop.SetCPU(f.CPU); err != nil {
		return usagef("--cpu: %v", err)
	}
	if f.Lost < 2 {
		return usagef("--lost %d: at least 2", f.Lost)
	}
	var kinds []string
	for _, k := range board.Kinds() {
		kinds = append(kinds, k.Name)
	}
	for i, spec := range f.Board {
		kind, _, ok := strings.Cut(spec, ":")
		if !ok || !slices.Contains(kinds, kind) {
			return usagef("--board %s: it is KIND:ARG, and the kinds of board are: %s", spec, strings.Join(kinds, " "))
		}
		if slices.Contains(f.Board[:i], spec) {
			return usagef("--board %s: is given twice", spec)
		}
	}
	return nil
}

// linkName returns the name of board n's link: board0, board1, ...
func (f *endFlags) linkName(n int) string {
	if n == 0 {
		return f.Name
	}
	stem := strings.TrimRight(f.Name, "0123456789")
	first, err := strconv.Atoi(f.Name[len(stem):])
	if err != nil {
		return f.Name + "-" + strconv.Itoa(n)
	}
	return stem + strconv.Itoa(first+n)
}

// end is what both programs have.
type end interface {
	Open(context.Context) error
	Run(context.Context) error
	Status() status.Link
}

// device is an interface that is open, with what was asked for.
type device struct {
	*tunbridge.Iface
	spec netSpec
}

// address sets the interface up.
func (d device) address() error {
	i, s := d.Iface, d.spec
	if err := ifaddr.Apply(i.Name(), s.addrs); err != nil {
		return usageError{err}
	}
	return ifaddr.Up(i.Name())
}

// serveEnd runs an end until a signal, with its status socket. Nothing is logged before all is
// known to be well: what is not is one line.
func (f *endFlags) serveEnd(side board.Side, ends []end, devices []device, log *slog.Logger) error {
	path := f.Status
	var unusable error // of the directory for the status socket: not worth to end for
	switch path {
	case "":
		if unusable = statussock.Prepare(); unusable == nil {
			path = statusd.DefaultPath(side.String(), f.Name)
		}
	case "none":
		path = ""
	}
	started := time.Now().Format(time.RFC3339)
	srv, err := statusd.Serve(path, func() status.Program {
		p := status.Program{Version: version(), Side: side.String(), PID: os.Getpid(), Started: started}
		for _, e := range ends {
			p.Links = append(p.Links, e.Status())
		}
		return p
	})
	if err != nil {
		return usageError{err}
	}
	defer srv.Close()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := openAll(ctx, ends); err != nil {
		return err
	}
	if unusable != nil {
		log.Warn("no status socket", "error", unusable)
	}
	for _, d := range devices {
		for _, w := range d.Warnings() {
			log.Warn(w, "interface", d.Name())
		}
		log.Info("interface ready", "interface", d.Name(), "addresses", d.spec.addrs)
	}
	// One board that fails for good does not take the others along.
	var wg sync.WaitGroup
	errs := make([]error, len(ends))
	for i, e := range ends {
		wg.Go(func() {
			if errs[i] = e.Run(ctx); errs[i] != nil && len(ends) > 1 {
				log.Error("link given up", "link", f.linkName(i), "error", errs[i])
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// openAll opens the boards of all ends, at the same time, as one may take seconds to fail. An error
// means that no board can be used nor waited for. Otherwise the ends go on: their Run waits for
// what is not there, and with several boards also for what is wrong (session.Config.Retry).
func openAll(ctx context.Context, ends []end) error {
	var wg sync.WaitGroup
	errs := make([]error, len(ends))
	for i, e := range ends {
		wg.Go(func() { errs[i] = e.Open(ctx) })
	}
	wg.Wait()
	if slices.Contains(errs, nil) {
		return nil
	}
	return errors.Join(errs...)
}

type hostCmd struct {
	endFlags
	BoardMAC tunbridge.MAC `placeholder:"MAC" help:"MAC address that the board's interface is given (default: one that stays the same for --name)."`
	QueueMax uint16        `default:"1024" help:"Largest queue size, a power of two."`
	Pool     bool          `default:"true" negatable:"" help:"Let the board reach host memory where it can (placement push)."`
	DMA      string        `name:"dma" enum:"auto,off,on" default:"auto" help:"What the board's DMA engine is for (${enum}), where this program can drive one: auto, what the board sends, where that is faster; on, both ways, however fast it is."`
	DMAMin   uint32        `name:"dma-min" placeholder:"BYTES" help:"Length below which the processor copies, not the DMA engine (default: measured at start)."`
}

func (c *hostCmd) Run(s *streams) error {
	if err := c.check(); err != nil {
		return err
	}
	if c.QueueMax < 2 || c.QueueMax > 32768 || c.QueueMax&(c.QueueMax-1) != 0 {
		return usagef("--queue-max %d: a power of two from 2 to 32768", c.QueueMax)
	}
	mode, err := host.ParseDMAMode(c.DMA)
	if err != nil {
		return usagef("--dma %v", err)
	}
	specs, err := c.specs(board.Host, c.BoardMAC)
	if err != nil {
		return err
	}
	deny, err := c.deny()
	if err != nil {
		return err
	}
	log := s.logger(c.Verbose)
	devices := make([]map[uint16]host.Backend, len(c.Board))
	var open []device
	closeAll := func() {
		for _, ds := range devices {
			for _, d := range ds {
				d.Close()
			}
		}
	}
	for _, sp := range specs {
		if devices[sp.board] == nil {
			devices[sp.board] = map[uint16]host.Backend{}
		}
		i := len(devices[sp.board]) // number on its link
		if err := c.stableMACs(&sp, i, log); err != nil {
			closeAll()
			return err
		}
		ic := sp.iface()
		if ic.MTU == 0 {
			ic.MTU = 1500
		}
		ic.Queues = sp.queues
		n, err := host.NewNet(host.NetConfig{Name: fmt.Sprintf("net%d", i), Number: uint16(i), Interface: ic, BoardMAC: sp.boardMAC,
			Deny: deny, Loop: c.loop.From(i), QueueMax: c.QueueMax})
		if err != nil {
			closeAll()
			return err
		}
		devices[sp.board][uint16(i)] = n
		d := device{n.Interface(), sp}
		open = append(open, d)
		if err := d.address(); err != nil {
			closeAll()
			return err
		}
	}
	var ends []end
	for b, spec := range c.Board {
		ends = append(ends, host.NewLink(host.Config{Name: c.linkName(b), Board: spec, Options: c.options(log), Devices: devices[b], NoPool: !c.Pool,
			DMA: host.DMAConfig{Mode: mode, Min: c.DMAMin},
			Log: log, Beat: c.Beat, LostBeats: c.Lost, NoInterrupts: !c.Interrupts, Retry: len(c.Board) > 1}))
	}
	if err := c.serveEnd(board.Host, ends, open, log); err != nil {
		closeAll()
		return err
	}
	return nil
}

type agentCmd struct {
	endFlags
	QueueSize uint16 `default:"256" help:"Queue size, a power of two; the host may ask for less."`
	Placement string `enum:"auto,window,push" default:"auto" help:"Where rings and buffers lie (${enum}): window, all in the board's memory; push, each where its reader is; auto, push where the host offers memory for it."`
	Ring      string `enum:"auto,split,packed" default:"auto" help:"Kind of virtqueue (${enum}): packed goes with placement window only; auto, split."`
	RXBuffer  uint32 `name:"rx-buffer" placeholder:"BYTES" help:"Size of a receive buffer (default: by the window, 16384 at most)."`
}

func (c *agentCmd) Run(s *streams) error {
	if err := c.check(); err != nil {
		return err
	}
	if c.QueueSize < 2 || c.QueueSize > 32768 || c.QueueSize&(c.QueueSize-1) != 0 {
		return usagef("--queue-size %d: a power of two from 2 to 32768", c.QueueSize)
	}
	if c.Ring == "packed" {
		if c.Placement == "push" {
			return usagef("--ring packed: not with --placement push (both sides write the one ring, and one of them would read it across the bus)")
		}
		c.Placement = "window"
	}
	if c.RXBuffer != 0 && (c.RXBuffer < 256 || c.RXBuffer > 1<<20) {
		return usagef("--rx-buffer %d: 256 to 1048576", c.RXBuffer)
	}
	if len(c.Board) != 1 {
		return usagef("--board: an agent has one board, %d are given", len(c.Board))
	}
	specs, err := c.specs(board.Agent, tunbridge.MAC{})
	if err != nil {
		return err
	}
	deny, err := c.deny()
	if err != nil {
		return err
	}
	log := s.logger(c.Verbose)
	var devices []*agent.Net
	var open []device
	closeAll := func() {
		for _, d := range devices {
			d.Close()
		}
	}
	for i, sp := range specs {
		n, err := agent.NewNet(agent.NetConfig{Name: fmt.Sprintf("net%d", i), Number: uint16(i), Interface: sp.iface(),
			Deny: deny, Loop: c.loop.From(i), Ring: c.Ring, Queues: sp.queues, QueueSize: c.QueueSize, RXBuffer: c.RXBuffer})
		if err != nil {
			closeAll()
			return err
		}
		devices = append(devices, n)
		open = append(open, device{n.Interface(), sp})
		if err := open[i].address(); err != nil {
			closeAll()
			return err
		}
	}
	l := agent.NewLink(agent.Config{Name: c.Name, Board: c.Board[0], Placement: c.Placement, Options: c.options(log), Devices: devices,
		Log: log, Beat: c.Beat, LostBeats: c.Lost, NoInterrupts: !c.Interrupts})
	if err := c.serveEnd(board.Agent, []end{l}, open, log); err != nil {
		closeAll()
		return err
	}
	return nil
}

var _ session.Logger = (*slog.Logger)(nil)
