package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sort"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/cmd/boardlink/internal/statusd"
	"github.com/boardlink/boardlink/control/vhostuser"
	"github.com/boardlink/boardlink/status"
)

type statusCmd struct {
	Path    []string `arg:"" optional:"" help:"Status sockets (default: all in ${status_dir}, and those of other users that you may ask)."`
	JSON    bool     `name:"json" help:"Print JSON: an array with one object for each program."`
	Verbose bool     `short:"v" help:"Show every counter, also those that are 0."`
}

func (c *statusCmd) Run(s *streams) error {
	paths := c.Path
	var notes []string
	if len(c.Path) == 0 {
		paths, notes = app.FindStatus()
	}
	// All are asked at once: one that is silent does not use up the time of the others.
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	answers, errs := make([]status.Program, len(paths)), make([]error, len(paths))
	var wg sync.WaitGroup
	for i, path := range paths {
		wg.Go(func() { answers[i], errs[i] = statusd.Get(ctx, path) })
	}
	wg.Wait()
	programs := []status.Program{}
	failed, unseen := false, len(notes)
	for i, err := range errs {
		switch {
		case err == nil:
			programs = append(programs, answers[i])
		case len(c.Path) == 0 && errors.Is(err, statusd.ErrNobody):
			// A program that was killed leaves its socket; the next one of its name replaces it.
			notes = append(notes, fmt.Sprintf("%s: left by a program that was killed", paths[i]))
		case len(c.Path) == 0 && errors.Is(err, statusd.ErrDenied):
			notes = append(notes, err.Error())
			unseen++
		default:
			fmt.Fprintf(s.err, "boardlink status: %s\n", printable(err.Error()))
			failed = true
		}
	}
	for _, n := range notes {
		fmt.Fprintf(s.err, "boardlink status: %s\n", printable(n))
	}
	if len(c.Path) == 0 && len(programs) == 0 && !failed {
		if unseen != 0 {
			return usagef("no program that this user may ask")
		}
		return usagef("no program answers in %s: is a host or an agent running? One started with --status PATH is asked by: boardlink status PATH", app.StatusDir())
	}
	if c.JSON {
		e := json.NewEncoder(s.out)
		e.SetIndent("", "  ")
		if err := e.Encode(programs); err != nil {
			return err
		}
	} else {
		for i := range programs {
			if i > 0 {
				fmt.Fprintln(s.out)
			}
			c.print(s, &programs[i])
		}
	}
	if failed {
		return statusError(exitFail)
	}
	return nil
}

// printable returns text without control characters: what another user's program says must not steer the
// terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && unicode.IsControl(r) {
			return '?'
		}
		return r
	}, text)
}

// printer passes on what is printable.
type printer struct{ w io.Writer }

func (p printer) Write(b []byte) (int, error) {
	if _, err := io.WriteString(p.w, printable(string(b))); err != nil {
		return 0, err
	}
	return len(b), nil
}

// stateOf returns the state of a link, with what led to it.
func stateOf(l *status.Link) string {
	if l.Reason == "" {
		return l.State
	}
	return l.State + ": " + l.Reason
}

func (c *statusCmd) print(s *streams, p *status.Program) {
	w := tabwriter.NewWriter(printer{s.out}, 0, 8, 2, ' ', 0)
	defer w.Flush()
	fmt.Fprintf(w, "%s\tpid %d, since %s, boardlink %s\n", p.Side, p.PID, p.Started, p.Version)
	if p.LogLost != 0 {
		fmt.Fprintf(w, "  log\t%d lines lost: standard error was not read in time\n", p.LogLost)
	}
	for _, l := range p.Links {
		fmt.Fprintf(w, "link %s\t%s: %s (since %s)\n", l.Name, l.Board, stateOf(&l), l.Since)
		if l.LastError != "" {
			fmt.Fprintf(w, "  error\t%s\n", l.LastError)
		}
		if !strings.HasPrefix(l.Board, vhostuser.Prefix) { // vhost-user has none
			fmt.Fprintf(w, "  epoch\t0x%08x, peer 0x%08x\n", l.Epoch, l.PeerEpoch)
		}
		fmt.Fprintf(w, "  window\t%s, %s memory, placement %s\n", sizeString(l.Window.Size), l.Window.Kind, l.Placement)
		for _, r := range l.Regions {
			fmt.Fprintf(w, "  region %s\t%#x, %#x bytes, device may %s\n", r.Name, r.Addr, r.Size, r.Access)
		}
		c.counters(w, "  counters", l.Counters)
		c.counters(w, "  bus", l.Bus)
		for _, d := range l.Devices {
			fmt.Fprintf(w, "  device %d %s\t%s\n", d.Number, d.Name, joined(&d))
			if d.LastError != "" {
				fmt.Fprintf(w, "    error\t%s\n", d.LastError)
			}
			for _, note := range d.Notes {
				fmt.Fprintf(w, "    note\t%s\n", note)
			}
			fmt.Fprintf(w, "    status\t%s\n", d.Status)
			if d.MaxPairs > 1 {
				fmt.Fprintf(w, "    queue pairs\t%d in use, %d at most\n", d.Pairs, d.MaxPairs)
			}
			fmt.Fprintf(w, "    offered\t%s\n", strings.Join(d.Offered, " "))
			fmt.Fprintf(w, "    allowed\t%s\n", strings.Join(d.Allowed, " "))
			fmt.Fprintf(w, "    negotiated\t%s\n", strings.Join(d.Negotiated, " "))
			c.counters(w, "    counters", d.Counters)
			for _, q := range d.Queues {
				ready := "not set up"
				if q.Ready {
					ready = fmt.Sprintf("%d descriptors, available %d, used %d", q.Size, q.Avail, q.Used)
				}
				fmt.Fprintf(w, "    queue %d %s\t%s\n", q.Index, q.Name, ready)
				c.counters(w, "      frames", q.Pump)
				c.counters(w, "      ring", q.Ring)
				c.counters(w, "      doorbell", q.Doorbell)
				c.counters(w, "      dma", q.DMA)
				if b := q.BusPerPacket; b != nil && b.Frames != 0 {
					fmt.Fprintf(w, "      bus, a frame\t%s\n", busAreas(*b))
				}
			}
		}
	}
}

// joined tells what a device is joined to.
func joined(d *status.Device) string {
	if d.Type != "net" {
		return fmt.Sprintf("%s: %s", d.Type, d.Interface)
	}
	carrier := "carrier off"
	if d.Carrier {
		carrier = "carrier on"
	}
	mac := ""
	if d.MAC != "" {
		mac = ", " + d.MAC
	}
	return fmt.Sprintf("%s on %s%s, MTU %d, %s", d.LinkType, d.Interface, mac, d.MTU, carrier)
}

// counters prints those that are not 0, in the order of their names.
func (c *statusCmd) counters(w *tabwriter.Writer, title string, m map[string]uint64) {
	var names []string
	for k, v := range m {
		if v != 0 || c.Verbose {
			names = append(names, k)
		}
	}
	sort.Strings(names)
	const perLine = 6
	for len(names) > 0 {
		n := min(perLine, len(names))
		var b strings.Builder
		for i, k := range names[:n] {
			if i > 0 {
				b.WriteString("  ")
			}
			fmt.Fprintf(&b, "%s %d", k, m[k])
		}
		fmt.Fprintf(w, "%s\t%s\n", title, b.String())
		title, names = "", names[n:]
	}
}
