package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/bench/doorbench"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/generic"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/pci/scan"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtiomsg"
)

type doctorCmd struct {
	Board string `arg:"" help:"The board, e.g. ivshmem:0000:00:04.0. No host may use it meanwhile."`
	JSON  bool   `name:"json" help:"Print JSON."`
}

// finding is one thing that doctor looked at.
type finding struct {
	Check   string   `json:"check"`
	OK      bool     `json:"ok"`
	Text    string   `json:"text"`
	Latency *latency `json:"latency_ns,omitempty"`
}

// latency is of single operations, in nanoseconds.
type latency struct {
	P50 int64 `json:"p50"`
	P99 int64 `json:"p99"`
	Max int64 `json:"max"`
}

func latencyOf(d []time.Duration) *latency {
	slices.Sort(d)
	return &latency{P50: int64(d[len(d)/2]), P99: int64(d[len(d)*99/100]), Max: int64(d[len(d)-1])}
}

func (l *latency) String() string {
	return fmt.Sprintf("%s median, %s p99", shortTime(l.P50), shortTime(l.P99))
}

func shortTime(ns int64) string {
	if ns < 10000 {
		return fmt.Sprintf("%d ns", ns)
	}
	return fmt.Sprintf("%.0f us", float64(ns)/1e3)
}

func (c *doctorCmd) Run(s *streams) error {
	p := newProgress(s.err, !c.JSON)
	var found []finding
	add := func(check string, ok bool, l *latency, format string, args ...any) {
		found = append(found, finding{check, ok, fmt.Sprintf(format, args...), l})
	}
	p.step("opening the board")
	err := c.examine(add, p.step)
	p.done()
	bad := err != nil
	for _, f := range found {
		bad = bad || !f.OK
	}
	if c.JSON {
		e := json.NewEncoder(s.out)
		e.SetIndent("", "  ")
		if jerr := e.Encode(found); jerr != nil {
			return jerr
		}
	} else {
		w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
		for _, f := range found {
			mark := "ok"
			if !f.OK {
				mark = "FAIL"
			}
			text := f.Text
			if f.Latency != nil {
				text = strings.TrimPrefix(text+", "+f.Latency.String(), ", ")
			}
			fmt.Fprintf(w, "%s\t%s\t%s\n", mark, f.Check, text)
		}
		w.Flush()
	}
	if err != nil {
		return err
	}
	if bad {
		return statusError(exitFail)
	}
	return nil
}

func (c *doctorCmd) examine(add func(check string, ok bool, l *latency, format string, args ...any), step func(string)) error {
	kind, arg, _ := strings.Cut(c.Board, ":")
	if kind == generic.Name {
		// The file first: what it says decides about the function.
		if err := generic.CheckSpec(arg); err != nil {
			return err
		}
	}
	if _, at, ok := strings.Cut(arg, "@"); ok {
		arg = at
	}
	name, _, _ := strings.Cut(arg, ",")
	if a, err := pci.ParseAddress(name); err == nil && kind != "loopback" {
		f, err := scan.One(pci.Sysfs{}, a)
		if err != nil {
			return err
		}
		d := describe(f)
		add("function", true, nil, "%s %s [%s]", d.Address, d.Name, d.ID)
		found := board.Examine(c.Board, board.Options{})
		for _, err := range found {
			check := "board"
			var e *pci.Error
			if errors.As(err, &e) {
				check = subject(e.Problem)
			}
			add(check, false, nil, "%s", problem(err))
		}
		if len(found) > 0 && (isInUse(found[0]) || errors.Is(found[0], board.ErrInput)) {
			return found[0] // no board: what else there is to say of it is nobody's concern
		}
		if len(found) == 0 {
			driver := f.Driver
			if driver == "" {
				driver = "none, which this mode needs"
			}
			add("driver", true, nil, "%s", driver)
		}
		switch {
		case f.IOMMUGroup == "":
			add("IOMMU", true, nil, "none: the board is not confined, and DMA maps are not possible")
		case len(d.Shared) > 0:
			add("IOMMU", true, nil, "group %s, shared with %s", f.IOMMUGroup, strings.Join(d.Shared, " "))
		default:
			add("IOMMU", true, nil, "group %s, alone in it", f.IOMMUGroup)
		}
		if d.Link != "" {
			add("link", !strings.Contains(d.Link, "could be"), nil, "%s", d.Link)
		}
	}
	b, err := board.Open(c.Board, board.Options{Side: board.Host})
	if err != nil {
		return err
	}
	defer b.Close()
	// A bus error is a finding, not the end of the program.
	if err := pci.Guard(func() { c.open(b, add, step) }); err != nil {
		add("window", false, nil, "%v", err)
	}
	return nil
}

// subject is what a problem of a function is about, as a line of the report is headed.
func subject(p pci.Problem) string {
	switch p {
	case pci.NoIOMMU, pci.NoIOMMUDisabled, pci.GroupShared:
		return "IOMMU"
	case pci.NoBAR:
		return "BARs"
	case pci.Unbound, pci.MissingModule, pci.InUse:
		return "driver"
	case pci.Permission, pci.Busy:
		return "access"
	}
	return "board"
}

func (c *doctorCmd) open(b board.Board, add func(check string, ok bool, l *latency, format string, args ...any), step func(string)) {
	w := b.Window()
	add("window", true, nil, "%s, %s", sizeString(w.Mem.Size()), w.Mem.Kind())
	if p, ok := b.(board.Pooled); ok {
		if r, ok := p.Pool(); ok {
			add("pool", true, nil, "%s of host memory that the board reaches", sizeString(r.Mem.Size()))
		}
	}

	step("reads and writes across the bus")
	// The last word of the host's block: reserved, the host's to write (docs/wire.md).
	const scratch = virtiomsg.PageSize - 8
	const n = 2000
	read, write := make([]time.Duration, n), make([]time.Duration, n)
	ones := true
	for i := range n {
		t := time.Now()
		v := w.Mem.Load32(scratch)
		read[i] = time.Since(t)
		ones = ones && v == 0xffffffff
		t = time.Now()
		w.Mem.Store32(scratch, uint32(i))
		write[i] = time.Since(t)
	}
	w.Mem.Store32(scratch, 0x5a5a1234)
	back := w.Mem.Load32(scratch)
	w.Mem.Store32(scratch, 0)
	switch {
	case ones:
		add("memory", false, nil, "the window reads as all-ones: the board is in reset, without power, or gone")
	case back != 0x5a5a1234:
		add("memory", false, nil, "wrote 0x5a5a1234 at %#x, read %#x back", scratch, back)
	}
	add("read, 32 bit", !ones, latencyOf(read), "")
	add("write, 32 bit", back == 0x5a5a1234, latencyOf(write), "posted")
	buf := make([]byte, 64<<10)
	if w.Mem.Size() >= uint64(len(buf)) {
		t := time.Now()
		k := 0
		for ; time.Since(t) < 200*time.Millisecond; k++ {
			w.Mem.CopyOut(buf, 0)
		}
		add("copy out", true, nil, "%.1f MB/s by the processor, 64 KiB at a time", float64(k*len(buf))/time.Since(t).Seconds()/1e6)
	}

	step("doorbell and interrupts")
	c.bells(b, add)

	blk, err := virtiomsg.ReadBlock(w, board.Agent)
	switch {
	case err != nil:
		add("agent", !errors.Is(err, virtiomsg.ErrLinkGone), nil, "none: %v", err)
	case blk.Epoch == 0:
		add("agent", true, nil, "not running")
	default:
		add("agent", true, nil, "epoch 0x%08x, heartbeat %d, %d regions", blk.Epoch, blk.Heartbeat, len(blk.Declaration.Regions))
		room := uint64(0)
		for _, r := range blk.Declaration.Regions {
			room += r.Size
		}
		text := sizeString(room) + " for rings and buffers"
		if room < 2*tunbridge.LongRoom {
			text += fmt.Sprintf(": little room for frames of 64 KiB, which take %s for each device and direction; where there is none, the agent does without TSO and USO", sizeString(tunbridge.LongRoom))
		}
		add("memory of the agent", true, nil, "%s", text)
	}
}

// bells rings this side's own first vector, where the board can do that, and waits for it: the doorbell's way to the
// bus and the interrupt's way back.
func (c *doctorCmd) bells(b board.Board, add func(check string, ok bool, l *latency, format string, args ...any)) {
	r, err := doorbench.Board(context.Background(), b, 300)
	if errors.Is(err, doorbench.ErrNoInterrupts) {
		add("interrupts", true, nil, "none: this side polls, which costs latency and some processor time")
		return
	}
	add("interrupts", true, nil, "%d vectors", b.Self().Vectors)
	switch {
	case errors.Is(err, doorbench.ErrNotSelf):
		add("doorbell loop", true, nil, "this kind of board cannot ring itself: start the agent and look at `boardlink status`")
		return
	case err != nil:
		add("doorbell loop", false, nil, "%v", err)
		return
	}
	add("doorbell write", true, latencyFrom(r.Write), "")
	if r.Lost > 0 {
		add("doorbell loop", false, nil, "%d of %d rings did not come back as interrupts within %v: links work by polling", r.Lost, int64(r.Lost)+r.Loop.Count, doorbench.LostAfter)
		return
	}
	add("doorbell loop", true, latencyFrom(r.Loop), "doorbell to interrupt to this program")
}

func latencyFrom(l benchkit.Latency) *latency { return &latency{P50: l.P50, P99: l.P99, Max: l.Max} }
