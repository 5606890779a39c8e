//go:build linux

package trial

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/traffic"
)

// Result is what a trial measured.
type Result struct {
	traffic.Result
	Bus               Bus     `json:"bus"`
	DoorbellsPerFrame float64 `json:"doorbells_per_packet"` // rung by both sides
	SyscallsPerFrame  float64 `json:"syscalls_per_packet"`  // reads and writes on both interfaces, for each frame
	Frames            uint64  `json:"frames"`               // that crossed the link, both ways
	GSOFrames         uint64  `json:"gso_frames"`           // of them, super-packets
	Dropped           uint64  `json:"dropped"`              // frames that an interface refused
	Rescued           uint64  `json:"rescued"`              // sleeps of both sides that the poll fallback ended, and a doorbell should have
	Setup             Setup   `json:"setup"`

	Console *ConsoleResult `json:"console,omitempty"` // nil: there was none
	Disk    *DiskResult    `json:"disk,omitempty"`
	Rng     *RngResult     `json:"rng,omitempty"`
}

// RngResult is what the source of entropy did.
type RngResult struct {
	Bytes uint64 `json:"bytes"` // that the board got
}

// OK reports whether every ping was answered, nothing was corrupt, and each device did something.
func (res *Result) OK() bool {
	if d := res.Disk; d != nil && (d.Bytes == 0 || d.Corrupt != 0 || d.Lost != 0) {
		return false
	}
	if c := res.Console; c != nil && (c.Bytes == 0 || c.Corrupt != 0 || c.Lost != 0) {
		return false
	}
	if res.Rng != nil && res.Rng.Bytes == 0 {
		return false
	}
	return res.Result.OK()
}

// Bus is what the accesses of both sides across the bus come to, each frame.
type Bus struct {
	status.PerFrame
	ControlReads uint64 `json:"control_reads"`
	// By direction of the frames, and of what a frame takes, by area: the queue's own accesses for it, and those of polls that found nothing.
	BoardToHost Way `json:"board_to_host"`
	HostToBoard Way `json:"host_to_board"`
}

// Way is one direction of frames.
type Way struct {
	status.BusPerFrame
	// IdlePolls is how many of the reads of the driver area (of a packed ring: of the descriptor area) found nothing new: the side across
	// looks again and again before it sleeps. They are not what a frame costs, but bus time all the same.
	IdlePolls float64 `json:"idle_polls_per_packet"`
}

// Setup is how the link was set up.
type Setup struct {
	Door       string   `json:"door,omitempty"` // "vhost-user": no board, but a socket of that protocol
	Link       string   `json:"link"`
	MTU        int      `json:"mtu"`
	Offload    string   `json:"offload"` // what the board's interface leaves to the host
	Placement  string   `json:"placement"`
	Ring       string   `json:"ring"`        // "split" or "packed"
	Pairs      int      `json:"queue_pairs"` // in use, of each device
	Window     uint64   `json:"window"`
	Memory     string   `json:"memory"`
	Negotiated []string `json:"negotiated"`
	// Congestion is TCP's congestion control in the namespaces, the system's; "" where that cannot be read. One that paces (bbr) bounds
	// TCP by its timers.
	Congestion string `json:"congestion_control,omitempty"`
}

// totals are a program's counters, summed over its links.
type totals struct {
	frames, gso, rings, syscalls, dropped, rescued uint64
	bus                                            map[string]uint64
	ways                                           [2]way // board to host, host to board
}

// way is one direction.
type way struct {
	frames uint64
	bus    status.Bus
	idle   int64 // polls across the bus that found nothing
}

func sum(p status.Program) totals {
	t := totals{bus: map[string]uint64{}}
	for _, l := range p.Links {
		for k, v := range l.Bus {
			t.bus[k] += v
		}
		for _, d := range l.Devices {
			for _, q := range d.Queues {
				if q.Name == "ctrl" {
					continue // no frames go by it
				}
				w := &t.ways[1]
				if strings.HasPrefix(q.Name, "tx") {
					w = &t.ways[0]
				}
				w.frames += q.Pump["frames"]
				if q.Bus != nil {
					w.bus = w.bus.Plus(*q.Bus)
				}
				if l.Placement == "window" && p.Side == board.Host.String() {
					w.idle += int64(q.Ring["index_reads"]) - int64(q.Ring["index_moved"])
				}
				t.frames += q.Pump["frames"]
				t.gso += q.Pump["gso_frames"]
				t.rings += q.Pump["rings"]
				t.syscalls += q.Pump["syscalls"]
				t.dropped += q.Pump["dropped"]
				t.rescued += q.Doorbell["rescued"]
			}
		}
	}
	return t
}

func (r *Rig) totals(ctx context.Context) (t [2]totals, err error) {
	for _, s := range []board.Side{board.Host, board.Agent} {
		p, err := r.Status(ctx, s)
		if err != nil {
			return t, err
		}
		t[s] = sum(p)
	}
	return t, nil
}

// Run starts both ends, runs the traffic, and ends them. Its result is good for what was
// measured even where there is an error.
func Run(ctx context.Context, cfg Config, tc traffic.RunConfig) (res Result, err error) {
	if tc.Step == nil {
		tc.Step = func(string) {}
	}
	tc.Step("bring-up")
	r, err := Start(cfg)
	if err != nil {
		return res, err
	}
	defer func() {
		if cerr := r.Close(); err == nil {
			err = cerr
		}
	}()
	wctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	err = r.WaitUp(wctx)
	cancel()
	if err != nil {
		return res, err
	}
	before, err := r.totals(ctx)
	if err != nil {
		return res, err
	}
	var pairs []traffic.Pair
	for n := 0; n < r.cfg.Nets; n++ {
		pairs = append(pairs, r.Pairs(n)...)
	}
	res.Result, err = traffic.Run(ctx, pairs, tc)
	if ctx.Err() != nil {
		return res, err
	}
	after, serr := r.totals(ctx)
	if serr != nil {
		return res, fmt.Errorf("an end is gone: %w", serr)
	}
	if err == nil {
		err = r.others(ctx, &res, tc.Step)
	}
	host, _ := r.Status(ctx, board.Host)
	res.figures(before, after)
	res.Setup = r.setup(host)
	return res, err
}

// others tries the devices beside the networks.
func (r *Rig) others(ctx context.Context, res *Result, step func(string)) error {
	if r.cfg.Console {
		step("console: " + fmt.Sprint(consoleBytes>>20) + " MiB each way")
		c, err := r.Console(ctx)
		res.Console = &c
		if err != nil {
			return err
		}
	}
	if r.cfg.Disk {
		step("disk: " + fmt.Sprint(diskSize>>20) + " MiB")
		d, err := r.Disk(ctx)
		res.Disk = &d
		if err != nil {
			return err
		}
	}
	if r.cfg.Rng {
		p, err := r.Status(ctx, board.Agent)
		if err != nil {
			return err
		}
		res.Rng = new(RngResult)
		for _, l := range p.Links {
			for _, d := range l.Devices {
				if d.Type == "entropy" {
					res.Rng.Bytes += d.Counters["bytes"]
				}
			}
		}
	}
	return nil
}

func (res *Result) figures(before, after [2]totals) {
	h, a := after[board.Host], after[board.Agent]
	h0, a0 := before[board.Host], before[board.Agent]
	res.Frames = h.frames - h0.frames
	res.GSOFrames = h.gso - h0.gso
	res.Dropped = h.dropped - h0.dropped + a.dropped - a0.dropped
	res.Rescued = h.rescued - h0.rescued + a.rescued - a0.rescued
	if res.Frames == 0 {
		return
	}
	per := func(n uint64) float64 { return float64(n) / float64(res.Frames) }
	bus := func(k string) uint64 { return h.bus[k] - h0.bus[k] + a.bus[k] - a0.bus[k] }
	all := status.Traffic{Reads: bus("reads"), ReadBytes: bus("read_bytes"), Writes: bus("writes"), WriteBytes: bus("write_bytes"), FlushReads: bus("flush_reads")}
	res.Bus = Bus{PerFrame: all.PerFrame(res.Frames), ControlReads: bus("control_reads")}
	for i, w := range []*Way{&res.Bus.BoardToHost, &res.Bus.HostToBoard} {
		// Frames are the host's; accesses those of both sides.
		n := h.ways[i].frames - h0.ways[i].frames
		w.BusPerFrame = h.ways[i].bus.Minus(h0.ways[i].bus).Plus(a.ways[i].bus.Minus(a0.ways[i].bus)).PerFrame(n)
		if n != 0 {
			w.IdlePolls = float64(h.ways[i].idle-h0.ways[i].idle) / float64(n)
		}
	}
	res.DoorbellsPerFrame = per(h.rings - h0.rings + a.rings - a0.rings)
	res.SyscallsPerFrame = per(h.syscalls - h0.syscalls + a.syscalls - a0.syscalls)
}

func (r *Rig) setup(host status.Program) Setup {
	s := Setup{Door: r.cfg.Door, Link: r.cfg.Link, MTU: r.cfg.MTU, Memory: r.cfg.Memory}
	// Not known is no error: it is told, and no more.
	_ = r.Pairs(0)[0].Host.NS.Do(func() error {
		b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control")
		s.Congestion = strings.TrimSpace(string(b))
		return err
	})
	if len(host.Links) > 0 {
		l := host.Links[0]
		s.Placement, s.Window, s.Memory = l.Placement, l.Window.Size, l.Window.Kind
		if len(l.Devices) > 0 {
			d := l.Devices[0]
			s.Offload, s.Negotiated, s.Pairs, s.Ring = d.Offload, d.Negotiated, d.Pairs, "split"
			if slices.Contains(d.Negotiated, "ring_packed") {
				s.Ring = "packed"
			}
		}
	}
	return s
}
