// Command boardlink-host is the carrier's end as a lean program: what `boardlink host` does, in Go 1.18
// without generics and with the standard flag package only, so that gccgo compiles it for embedded PowerPC
// carriers (docs/ports.md).
package main

import (
	"fmt"
	"os"

	"github.com/boardlink/boardlink/board"
	_ "github.com/boardlink/boardlink/board/loopback" // registers itself
	"github.com/boardlink/boardlink/cmd/internal/lean"
	"github.com/boardlink/boardlink/host"
)

func main() {
	f := lean.New(board.Host)
	queueMax := f.Set.Uint("queue-max", 1024, "largest queue size, a power of two")
	pool := f.Set.Bool("pool", true, "let the board reach host memory where it can (placement push)")
	engine := f.Set.String("dma", "auto", "what the board's DMA engine is for: auto, off, on (both ways)")
	engineMin := f.Set.Uint("dma-min", 0, "length in `bytes` below which the processor copies, not the DMA engine (default: measured at start)")
	f.Exit(run(f, os.Args[1:], queueMax, pool, engine, engineMin))
}

func run(f *lean.Flags, args []string, queueMax *uint, pool *bool, engine *string, engineMin *uint) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	if n := *queueMax; n < 2 || n > 32768 || n&(n-1) != 0 {
		return lean.Usagef("--queue-max %d: a power of two from 2 to 32768", n)
	}
	mode, err := host.ParseDMAMode(*engine)
	if err != nil {
		return lean.Usagef("--dma %v", err)
	}
	if uint64(*engineMin) > 1<<32-1 {
		return lean.Usagef("--dma-min %d: up to 4294967295", *engineMin)
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
	devices := map[uint16]host.Backend{}
	closeAll := func() {
		for _, d := range devices {
			d.Close()
		}
	}
	for i := range nets {
		s := &nets[i]
		if err := f.StableMACs(s, i); err != nil {
			closeAll()
			return err
		}
		ic := s.Interface()
		ic.Queues = s.Queues
		if ic.MTU == 0 {
			ic.MTU = 1500
		}
		n, err := host.NewNet(host.NetConfig{Name: fmt.Sprintf("net%d", i), Number: uint16(i), Interface: ic, BoardMAC: s.BoardMAC,
			Deny: deny, Loop: f.Loop.From(i), QueueMax: uint16(*queueMax)})
		if err != nil {
			closeAll()
			return err
		}
		devices[uint16(i)] = n
		if err := f.Address(n.Interface(), s); err != nil {
			closeAll()
			return err
		}
	}
	l := host.NewLink(host.Config{Name: f.Name, Board: f.Board, NoPool: !*pool, DMA: host.DMAConfig{Mode: mode, Min: uint32(*engineMin)}, Options: options, Devices: devices,
		Log: f.Log, Beat: f.Beat, LostBeats: f.Lost, NoInterrupts: !f.Interrupts})
	if err := f.Serve(l); err != nil {
		closeAll()
		return err
	}
	return nil
}
