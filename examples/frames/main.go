// Frames is an example: a program that speaks to a board, or on a board to its host, in Ethernet frames without a network
// interface. Both ends run it. Each sends numbered frames with a checksum, checks those of the other end, and prints what it has
// counted.
//
//	boardlink serve /tmp/a.sock &
//	go run ./examples/frames -side host -board loopback:/tmp/a.sock &
//	go run ./examples/frames -side agent -board loopback:/tmp/a.sock
//
// Either end may start first, and may be stopped and started again. -board takes each kind of board in docs/boards.md.
package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/agent"
	_ "github.com/boardlink/boardlink/board/all" // the kinds of board
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/framedev"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/framedrv"
	"github.com/boardlink/boardlink/frames"
	"github.com/boardlink/boardlink/host"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, errUsage):
		os.Exit(2) // package flag has said why
	case err != nil:
		fmt.Fprintln(os.Stderr, "frames:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("usage")

// run runs one end of a link until ctx ends.
func run(ctx context.Context, args []string, out, log io.Writer) error {
	f := flag.NewFlagSet("frames", flag.ContinueOnError)
	f.SetOutput(log)
	side := f.String("side", "", "which end of the link this is: host or agent")
	spec := f.String("board", "", "the board: loopback:PATH, or another kind")
	mtu := f.Int("mtu", 1500, "the largest packet, in bytes")
	every := f.Duration("every", time.Second, "how often the counters are printed")
	if err := f.Parse(args); err != nil {
		return errUsage
	}
	if *side != "host" && *side != "agent" || *spec == "" || *every <= 0 || f.NArg() > 0 {
		fmt.Fprintln(log, "frames: -side host or -side agent, -board and an -every above 0 are needed")
		f.Usage()
		return errUsage
	}
	logger := slog.New(slog.NewTextHandler(log, nil))
	t := &traffic{side: *side}

	// The two ends differ in what a link is made of; the traffic is the same.
	var link interface{ Run(context.Context) error }
	if *side == "host" {
		dev, err := framedev.New(framedev.Config{Handler: t.handle, MTU: *mtu, MAC: [6]byte{2, 0, 0, 0, 0, 1}, BoardMAC: [6]byte{2, 0, 0, 0, 0, 2}})
		if err != nil {
			return err
		}
		defer dev.Close()
		link = host.NewLink(host.Config{Name: "example", Board: *spec, Devices: map[uint16]device.Device{0: dev}, Log: logger})
	} else {
		drv, err := framedrv.New(framedrv.Config{Handler: t.handle, MTU: *mtu})
		if err != nil {
			return err
		}
		defer drv.Close()
		link = agent.NewLink(agent.Config{Name: "example", Board: *spec, Devices: []driver.Driver{drv}, Log: logger})
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- link.Run(ctx) }()
	tick := time.NewTicker(*every)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			fmt.Fprintln(out, t)
			return err
		case <-tick.C:
			fmt.Fprintln(out, t)
		}
	}
}

// traffic sends and checks frames.
type traffic struct {
	side string

	ups, sent, received, corrupt, lost atomic.Uint64
}

// String returns the counters.
func (t *traffic) String() string {
	return fmt.Sprintf("side=%s ups=%d sent=%d received=%d corrupt=%d lost=%d", t.side, t.ups.Load(), t.sent.Load(), t.received.Load(), t.corrupt.Load(), t.lost.Load())
}

// handle is the frames.Handler: it is called each time that the device has come up, and returns when it goes down.
func (t *traffic) handle(ctx context.Context, p frames.Port) error {
	t.ups.Add(1)
	return frames.Both(ctx, p,
		func(ctx context.Context, s frames.Sender) error { return t.send(ctx, s, p.MAC, p.MaxFrame) }, t.receive)
}

// A frame: Ethernet header (to all, from our MAC, an EtherType for experiments), then the sender's run, the frame's number in
// that run, filling, and the checksum of all before it. A run is one call of send: the numbers of a run have no gaps.
const (
	etherType = 0x88b5 // IEEE 802, local experimental
	offRun    = 14
	offNumber = 22
	offFill   = 30
	sumLen    = 4
	minFrame  = 64
)

func (t *traffic) send(ctx context.Context, s frames.Sender, mac [6]byte, longest int) error {
	var run [8]byte
	if _, err := rand.Read(run[:]); err != nil {
		return err
	}
	for number := uint64(0); ctx.Err() == nil; {
		out, err := s.Reserve(frames.DefaultBatch)
		if err != nil {
			return err
		}
		if len(out) == 0 {
			if why, err := s.Wait(); err != nil || why&doorbell.Stopped != 0 {
				return err
			}
			continue
		}
		for i := range out {
			n := minFrame + int(number*97%uint64(longest-minFrame+1)) // all lengths
			fill(out[i].Room[:n], mac, run[:], number)
			out[i].Len = n
			number++
		}
		if err := s.Send(len(out)); err != nil {
			return err
		}
		t.sent.Add(uint64(len(out)))
	}
	return nil
}

func fill(b []byte, mac [6]byte, run []byte, number uint64) {
	copy(b, "\xff\xff\xff\xff\xff\xff")
	copy(b[6:], mac[:])
	binary.BigEndian.PutUint16(b[12:], etherType)
	copy(b[offRun:], run)
	binary.BigEndian.PutUint64(b[offNumber:], number)
	end := len(b) - sumLen
	for i := range b[offFill:end] {
		b[offFill+i] = byte(number) + byte(i)
	}
	binary.BigEndian.PutUint32(b[end:], crc32.ChecksumIEEE(b[:end]))
}

func (t *traffic) receive(_ context.Context, r frames.Receiver) error {
	var run, next uint64
	for {
		in, err := r.Receive(frames.DefaultBatch)
		if err != nil {
			return err
		}
		if len(in) == 0 {
			if why, err := r.Wait(); err != nil || why&doorbell.Stopped != 0 {
				return err
			}
			continue
		}
		for _, b := range in {
			end := len(b) - sumLen
			if len(b) < minFrame || binary.BigEndian.Uint16(b[12:]) != etherType || crc32.ChecksumIEEE(b[:end]) != binary.BigEndian.Uint32(b[end:]) {
				t.corrupt.Add(1)
				continue
			}
			from, number := binary.BigEndian.Uint64(b[offRun:]), binary.BigEndian.Uint64(b[offNumber:])
			if from != run {
				run, next = from, number
			}
			t.lost.Add(number - next)
			next = number + 1
			t.received.Add(1)
		}
	}
}
