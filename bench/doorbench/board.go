//go:build linux

package doorbench

import (
	"context"
	"errors"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/doorbell"
)

// BoardResult is a board's doorbell, rung by this side for itself: out to the bus, and back as an interrupt.
type BoardResult struct {
	Board string           `json:"board"`
	Write benchkit.Latency `json:"write"` // of the register
	Loop  benchkit.Latency `json:"loop"`  // from before the write until this program has slept, was woken and has acknowledged
	Lost  int              `json:"lost"`  // rings that did not come back within LostAfter; after three no more are tried
	CPU   float64          `json:"cpu_ns"`
}

// LostAfter is how long a ring may take.
const LostAfter = 200 * time.Millisecond

// Errors of Board: why there is nothing to measure.
var (
	ErrNoInterrupts = errors.New("this side of the board has no interrupts: it polls")
	ErrNotSelf      = errors.New("this kind of board cannot ring itself")
)

// Board rings a board's own first vector n times and waits for each. Nobody else may use the board meanwhile.
func Board(ctx context.Context, b board.Board, n int) (*BoardResult, error) {
	if b.Self().Method == board.RingNone || b.Waiter(0).FD() < 0 {
		return nil, ErrNoInterrupts
	}
	sr, ok := b.(board.SelfRinging)
	if !ok {
		return nil, ErrNotSelf
	}
	r, err := sr.RingSelf(0)
	if err != nil {
		return nil, err
	}
	sl := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: b.Waiter(0), Fallback: doorbell.Fallback{Min: LostAfter, Max: LostAfter}})
	write, loop := benchkit.NewHistogram(), benchkit.NewHistogram()
	res := &BoardResult{Board: b.String()}
	cpu := benchkit.ProcessCPU()
	for i := 0; i < n && res.Lost < 3 && ctx.Err() == nil; i++ {
		t := time.Now()
		if err := r.Ring(); err != nil {
			return nil, err
		}
		rung := time.Now()
		why, err := sl.Sleep(0)
		sl.Found(true)
		if err != nil {
			return nil, err
		}
		write.Record(rung.Sub(t))
		if why&doorbell.Rung == 0 {
			res.Lost++
			continue
		}
		loop.Record(time.Since(t))
	}
	res.Write, res.Loop = write.Latency(), loop.Latency()
	res.CPU = float64(benchkit.ProcessCPU()-cpu) / float64(max(1, res.Write.Count))
	return res, ctx.Err()
}
