package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
	"github.com/boardlink/boardlink/tunbridge"
)

type loopbackCmd struct {
	Duration  time.Duration `default:"3s" help:"Of each measurement: TCP and UDP, each way."`
	Door      string        `enum:"board,vhost-user" default:"board" help:"What joins both ends (${enum}): a loopback board, or a vhost-user socket, with the board's end as front end and the host as back end."`
	Link      string        `enum:"tap,tun" default:"tap" help:"tap: Ethernet frames. tun: raw IP packets."`
	Offload   bool          `default:"true" negatable:"" help:"Leave checksums and segmentation to the other side where the kernel can."`
	MTU       int           `default:"1500" help:"MTU in bytes."`
	Placement string        `enum:"auto,window,push" default:"auto" help:"Where rings and buffers lie (${enum}): window, all in the board's memory; push (as auto), each where its reader is."`
	Ring      string        `enum:"auto,split,packed" default:"auto" help:"Kind of virtqueue (${enum}): packed goes with placement window only; auto, split."`
	Queues    int           `default:"1" help:"Queue pairs of each device, 1 to ${max_queues}."`
	Memory    string        `enum:"cached,write-combining,uncached" default:"cached" help:"How memory across the bus is accessed (${enum}): the last two take the paths for device memory."`
	Window    string        `default:"16M" help:"Size of the shared memory (half the board's, half the host's): a power of two, with K, M or G."`
	Nets      int           `default:"1" help:"Network devices on the link."`
	Devices   []string      `default:"net" placeholder:"LIST" help:"Types of devices on the link, besides the networks: console, disk, rng, e.g. net,console,disk,rng (default: net)."`
	BusyPoll  string        `default:"auto" placeholder:"DURATION" help:"How long a loop with nothing to do busy-polls before it sleeps: auto, off, or e.g. 50us (default: ${default})."`
	CPU       []string      `placeholder:"BOARD,HOST" help:"Processors to lock the loops of the board's end and of the host's to, e.g. 0,1 (default: none)."`
	JSON      bool          `name:"json" help:"Print the result as JSON."`
	Verbose   bool          `short:"v" help:"Show the log of both ends."`
}

func (c *loopbackCmd) Run(s *streams) error {
	window, err := parseSize(c.Window)
	if err != nil {
		return err
	}
	if window < loopback.MinSize || window&(window-1) != 0 {
		return usagef("--window %s: a power of two, and at least %s", c.Window, sizeString(loopback.MinSize))
	}
	limit := 65535
	if c.Link == "tap" {
		limit -= 14
	}
	if c.MTU < 1280 || c.MTU > limit {
		return usagef("--mtu %d: 1280 (IPv6 needs it) to %d", c.MTU, limit)
	}
	if c.Duration < 100*time.Millisecond || c.Duration > time.Hour {
		return usagef("--duration %v: 100ms to 1h", c.Duration)
	}
	var loop tunbridge.LoopConfig
	if err := loop.SetBusyPoll(c.BusyPoll); err != nil {
		return usagef("--busy-poll: %v", err)
	}
	if n := len(c.CPU); n != 0 && n != 2 {
		return usagef("--cpu: two processors are needed, of the board's end and the host's, %d are given", n)
	}
	for _, cpu := range c.CPU {
		if err := loop.SetCPU(cpu); err != nil {
			return usagef("--cpu: %v", err)
		}
	}
	if c.Nets < 1 || c.Nets > 16 {
		return usagef("--nets %d: 1 to 16", c.Nets)
	}
	types, err := c.deviceTypes()
	if err != nil {
		return err
	}
	if c.Queues < 1 || c.Queues > tunbridge.MaxQueues {
		return usagef("--queues %d: 1 to %d", c.Queues, tunbridge.MaxQueues)
	}
	if c.Ring == "packed" && c.Placement == "push" {
		return usagef("--ring packed: not with --placement push (both sides write the one ring, and one of them would read it across the bus)")
	}
	door := ""
	if c.Door == "vhost-user" {
		if err := c.checkDoor(); err != nil {
			return err
		}
		door = c.Door
	}
	if err := netns.CheckTun(); err != nil {
		return usageError{err}
	}
	if netns.NeedsUser() {
		return usageError{netns.EnterUser()} // does not return where it can be
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()

	p := newProgress(s.err, !c.JSON && !c.Verbose)
	cfg := trial.Config{Exe: exe, Door: door, Link: c.Link, Offload: c.Offload, MTU: c.MTU, Window: window, Memory: c.Memory, Nets: c.Nets, Console: types["console"], Disk: types["disk"], Rng: types["rng"],
		Placement: c.Placement, Ring: c.Ring, Queues: c.Queues}
	cfg.AgentArgs, cfg.HostArgs = []string{"--busy-poll", c.BusyPoll}, []string{"--busy-poll", c.BusyPoll}
	if len(c.CPU) > 0 {
		cfg.AgentArgs, cfg.HostArgs = append(cfg.AgentArgs, "--cpu", c.CPU[0]), append(cfg.HostArgs, "--cpu", c.CPU[1])
	}
	if c.Verbose {
		cfg.Log = s.err
	}
	res, err := trial.Run(ctx, cfg, traffic.RunConfig{Duration: c.Duration, Step: p.step})
	p.done()
	var end *trial.EndError
	var setup *trial.SetupError
	switch {
	case errors.As(err, &setup):
		return usageError{err}
	case errors.As(err, &end) && end.ExitCode() == exitUsage:
		return usageError{err}
	case ctx.Err() != nil:
		return errors.New("interrupted")
	case err != nil && res.Ping.Sent == 0:
		return err
	}
	if c.JSON {
		e := json.NewEncoder(s.out)
		e.SetIndent("", "  ")
		if jerr := e.Encode(res); jerr != nil {
			return jerr
		}
	} else {
		printTrial(s, &res)
	}
	if err != nil {
		return err
	}
	if !res.OK() {
		fmt.Fprintf(s.err, "boardlink loopback: %d of %d pings lost, %d corrupt\n", res.Ping.Lost, res.Ping.Sent, res.Corrupt)
		return statusError(exitFail)
	}
	return nil
}

// checkDoor refuses what has no meaning over vhost-user, where the front end's memory is this machine's.
func (c *loopbackCmd) checkDoor() error {
	switch {
	case c.Link != "tap":
		return usagef("--link %s: not with --door vhost-user, which carries Ethernet frames", c.Link)
	case c.Placement != "auto":
		return usagef("--placement %s: not with --door vhost-user: no bus is between the ends", c.Placement)
	case c.Memory != "cached":
		return usagef("--memory %s: not with --door vhost-user: no bus is between the ends", c.Memory)
	case c.Nets != 1:
		return usagef("--nets %d: not with --door vhost-user: a socket has one device", c.Nets)
	case len(c.Devices) != 1:
		return usagef("--devices %s: not with --door vhost-user: a socket has one device", strings.Join(c.Devices, ","))
	case c.Window != "16M":
		return usagef("--window %s: not with --door vhost-user: the front end brings its own memory", c.Window)
	}
	return nil
}

// deviceTypes reads --devices.
func (c *loopbackCmd) deviceTypes() (map[string]bool, error) {
	types := map[string]bool{}
	for _, t := range c.Devices {
		switch t {
		case "net", "console", "disk", "rng":
			types[t] = true
		default:
			if _, err := strconv.Atoi(t); err == nil {
				return nil, usagef("--devices %s: it takes types of device, e.g. net,console,disk,rng; the number of networks is --nets %s", t, t)
			}
			return nil, usagef("--devices: there is no type %q; there are net, console, disk, rng", t)
		}
	}
	if !types["net"] {
		return nil, usagef("--devices %s: net is missing: it is always there, for what is measured beside the others", strings.Join(c.Devices, ","))
	}
	return types, nil
}

func printTrial(s *streams, r *trial.Result) {
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	pairs := ""
	if r.Setup.Pairs > 1 {
		pairs = fmt.Sprintf(", %d queue pairs", r.Setup.Pairs)
	}
	if r.Setup.Door != "" {
		row("link", "%s over %s, MTU %d, %s rings%s", r.Setup.Link, r.Setup.Door, r.Setup.MTU, r.Setup.Ring, pairs)
	} else {
		row("link", "%s, MTU %d, window %s (%s memory), placement %s, %s rings%s", r.Setup.Link, r.Setup.MTU, sizeString(r.Setup.Window), r.Setup.Memory, r.Setup.Placement,
			r.Setup.Ring, pairs)
	}
	row("features", "%s", strings.Join(r.Setup.Negotiated, " "))
	row("ping", "%d sent, %d lost, round trip %.0f us median, %.0f us p99", r.Ping.Sent, r.Ping.Lost, r.RTT.P50, r.RTT.P99)
	tcp := "every byte checked"
	if r.Setup.Congestion != "" {
		tcp += ", congestion control " + r.Setup.Congestion
	}
	row("tcp", "%.2f Gbit/s board to host, %.2f host to board, %s", r.TCPGbps.BoardToHost, r.TCPGbps.HostToBoard, tcp)
	row("udp, 64 bytes", "%.0f kpps board to host, %.0f host to board", r.UDP64Kpps.BoardToHost, r.UDP64Kpps.HostToBoard)
	row("corrupt", "%d", r.Corrupt)
	if c := r.Console; c != nil {
		row("console", "%d MiB each way, %.0f MB/s board to host, %.0f host to board, %d bytes corrupt, %d lost", c.Bytes>>20, c.MBps.BoardToHost, c.MBps.HostToBoard, c.Corrupt, c.Lost)
		row("key, round trip", "%.0f us median, %.0f us p99; beside a flood of frames %.0f and %.0f", c.Key.P50, c.Key.P99, c.Beside.P50, c.Beside.P99)
	}
	if d := r.Disk; d != nil {
		row("disk", "%d MiB written at %.0f MB/s, read at %.0f MB/s, %d bytes corrupt", d.Bytes>>20, d.WriteMBps, d.ReadMBps, d.Corrupt)
		row("ping beside the disk", "%.0f us median, %.0f us p99 (idle %.0f and %.0f), %d lost", d.Beside.P50, d.Beside.P99, d.Idle.P50, d.Idle.P99, d.Lost)
	}
	if r.Rng != nil {
		row("rng", "%d random bytes of the host reached the board", r.Rng.Bytes)
	}
	if r.Setup.Door == "" {
		printBus(row, r)
	}
	row("doorbells", "%.3f a frame, %d rescued by polling", r.DoorbellsPerFrame, r.Rescued)
	w.Flush()
}

// printBus prints what a frame takes across the bus.
func printBus(row func(name, format string, args ...any), r *trial.Result) {
	row("bus, a frame", "%.2f reads, %.2f writes, %.0f bytes read, %.0f written, %.3f reads to flush, both sides", r.Bus.Reads, r.Bus.Writes, r.Bus.ReadBytes, r.Bus.WriteBytes, r.Bus.FlushReads)
	for _, d := range []struct {
		name string
		w    *trial.Way
	}{{"board to host", &r.Bus.BoardToHost}, {"host to board", &r.Bus.HostToBoard}} {
		idle := ""
		if d.w.IdlePolls != 0 {
			idle = fmt.Sprintf("; of the reads %.2f polls in vain", d.w.IdlePolls)
		}
		row("bus, "+d.name, "%s%s", busAreas(d.w.BusPerFrame), idle)
	}
}

// busAreas tells where the accesses across the bus for a frame go.
func busAreas(b status.BusPerFrame) string {
	var at []string
	for _, a := range []struct {
		name string
		p    status.PerFrame
	}{{"descriptors", b.Areas.Descriptor}, {"driver area", b.Areas.Driver}, {"device area", b.Areas.Device}, {"payload", b.Areas.Payload}} {
		if a.p.Reads == 0 && a.p.Writes == 0 {
			at = append(at, a.name+" none")
			continue
		}
		at = append(at, fmt.Sprintf("%s %.2f reads %.2f writes", a.name, a.p.Reads, a.p.Writes))
	}
	return strings.Join(at, ", ")
}

func sizeString(n uint64) string {
	for _, u := range []struct {
		name  string
		shift uint
	}{{"GiB", 30}, {"MiB", 20}, {"KiB", 10}} {
		if n >= 1<<u.shift && n%(1<<u.shift) == 0 {
			return fmt.Sprintf("%d %s", n>>u.shift, u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}
