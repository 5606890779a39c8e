// Command boardlink-agent is the board's end as a lean program: what `boardlink agent` does, in Go 1.18
// without generics and with the standard flag package only, so that gccgo compiles it for 32-bit PowerPC and
// for 64-bit PowerPC below POWER8 (docs/ports.md).
package main

import (
	"fmt"
	"os"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board"
	_ "github.com/boardlink/boardlink/board/loopback" // registers itself
	"github.com/boardlink/boardlink/cmd/internal/lean"
)

func main() {
	f := lean.New(board.Agent)
	queueSize := f.Set.Uint("queue-size", 256, "queue size, a power of two; the host may ask for less")
	rxBuffer := f.Set.Uint("rx-buffer", 0, "size of a receive buffer in bytes (default: by the window, 16384 at most)")
	placement := f.Set.String("placement", "auto", "where rings and buffers lie: window, push or auto")
	ring := f.Set.String("ring", "auto", "kind of virtqueue: split, packed (with placement window only) or auto (split)")
	f.Exit(run(f, os.Args[1:], queueSize, rxBuffer, placement, ring))
}

func run(f *lean.Flags, args []string, queueSize, rxBuffer *uint, placement, ring *string) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	if n := *queueSize; n < 2 || n > 32768 || n&(n-1) != 0 {
		return lean.Usagef("--queue-size %d: a power of two from 2 to 32768", n)
	}
	if n := *rxBuffer; n != 0 && (n < 256 || n > 1<<20) {
		return lean.Usagef("--rx-buffer %d: 256 to 1048576", n)
	}
	if p := *placement; p != "auto" && p != "window" && p != "push" {
		return lean.Usagef("--placement %s: auto, window or push", p)
	}
	if r := *ring; r != "auto" && r != "split" && r != "packed" {
		return lean.Usagef("--ring %s: auto, split or packed", r)
	}
	if *ring == "packed" {
		if *placement == "push" {
			return lean.Usagef("--ring packed: not with --placement push (both sides write the one ring, and one of them would read it across the bus)")
		}
		*placement = "window"
	}
	nets, err := f.Nets()
	if err != nil {
		return err
	}
	deny, err := f.Deny()
	if err != nil {
		return err
	}
	options, err := f.Options()
	if err != nil {
		return err
	}
	var devices []*agent.Net
	closeAll := func() {
		for _, d := range devices {
			d.Close()
		}
	}
	for i := range nets {
		n, err := agent.NewNet(agent.NetConfig{Name: fmt.Sprintf("net%d", i), Number: uint16(i), Interface: nets[i].Interface(),
			Deny: deny, Loop: f.Loop.From(i), Ring: *ring, Queues: nets[i].Queues, QueueSize: uint16(*queueSize), RXBuffer: uint32(*rxBuffer)})
		if err != nil {
			closeAll()
			return err
		}
		devices = append(devices, n)
		if err := f.Address(n.Interface(), &nets[i]); err != nil {
			closeAll()
			return err
		}
	}
	l := agent.NewLink(agent.Config{Name: f.Name, Board: f.Board, Placement: *placement, Options: options, Devices: devices,
		Log: f.Log, Beat: f.Beat, LostBeats: f.Lost, NoInterrupts: !f.Interrupts})
	if err := f.Serve(l); err != nil {
		closeAll()
		return err
	}
	return nil
}
