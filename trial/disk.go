//go:build linux

package trial

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/trial/disk"
	"github.com/boardlink/boardlink/trial/traffic"
)

const (
	diskName   = "disk0"
	diskImage  = "disk0.img"
	diskSocket = "disk0.nbd"
	diskSize   = 32 << 20 // bytes
	diskDepth  = 8        // requests under way
	diskPiece  = 64 << 10 // bytes of one
)

// DiskResult is what the disk did: every block written, flushed, and read back.
type DiskResult struct {
	Bytes     uint64  `json:"bytes"` // of the disk
	WriteMBps float64 `json:"write_mb_per_second"`
	ReadMBps  float64 `json:"read_mb_per_second"`
	Corrupt   uint64  `json:"corrupt"` // bytes
	// Idle is the round trip of pings when nothing else runs, Beside the one while the disk is read and written at full
	// speed.
	Idle   traffic.RTT `json:"ping_idle_us"`
	Beside traffic.RTT `json:"ping_beside_us"`
	Lost   int         `json:"ping_lost"` // of both
}

// makeImage makes the disk's image.
func (r *Rig) makeImage() error {
	f, err := os.OpenFile(r.place.path(diskImage), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(diskSize)
}

// diskArgs returns the flags of a side for the disk.
func (r *Rig) diskArgs(s board.Side) []string {
	if s == board.Host {
		return []string{"--disk", "name=" + diskName + ",file=" + r.place.childPath(diskImage)}
	}
	return []string{"--disk", "name=" + diskName + ",export=" + r.place.childPath(diskSocket)}
}

// Disk tries the disk, and the network beside it.
func (r *Rig) Disk(ctx context.Context) (DiskResult, error) {
	var d DiskResult
	p := r.Pairs(0)[0]
	ping := func(count int) (traffic.PingResult, error) {
		return traffic.Ping(ctx, p.Board.NS, p.Host.Addr, traffic.PingConfig{Count: count, Interval: 5 * time.Millisecond, Peer: p.Host.NS})
	}
	idle, err := ping(100)
	d.Idle, d.Lost = idle.RTT, idle.Lost
	if err != nil {
		return d, err
	}
	failed := make(chan error, 1)
	go func() { failed <- r.fillDisk(ctx, &d) }()
	var beside traffic.Result
	for {
		res, perr := ping(20)
		beside.AddPing(res)
		select {
		case err := <-failed:
			d.Beside, d.Lost = beside.RTT, d.Lost+beside.Ping.Lost
			if err == nil {
				err = perr
			}
			return d, err
		default:
		}
	}
}

// fillDisk writes the whole disk by the agent's export, and reads it back.
func (r *Rig) fillDisk(ctx context.Context, d *DiskResult) error {
	c, err := disk.Dial(r.place.path(diskSocket), diskName)
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() }) // ends what waits
	defer stop()
	d.Bytes = c.Size
	took, err := eachPiece(ctx, d.Bytes, func(buf []byte, off uint64) error {
		fillBlocks(buf, off)
		return c.Write(buf, off, false)
	})
	if err == nil {
		err = c.Flush()
	}
	if err != nil {
		return fmt.Errorf("disk: write: %w", err)
	}
	d.WriteMBps = float64(d.Bytes) / 1e6 / took.Seconds()
	var bad atomic.Uint64
	took, err = eachPiece(ctx, d.Bytes, func(buf []byte, off uint64) error {
		if err := c.Read(buf, off); err != nil {
			return err
		}
		bad.Add(wrongBytes(buf, off))
		return nil
	})
	d.Corrupt = bad.Load()
	if err != nil {
		return fmt.Errorf("disk: read: %w", err)
	}
	d.ReadMBps = float64(d.Bytes) / 1e6 / took.Seconds()
	return nil
}

// eachPiece calls f for each piece of size bytes, diskDepth calls at a time, and returns how long that took.
func eachPiece(ctx context.Context, size uint64, f func(buf []byte, off uint64) error) (time.Duration, error) {
	begin := time.Now()
	var next atomic.Uint64
	var wg sync.WaitGroup
	errs := make(chan error, diskDepth)
	for range diskDepth {
		wg.Go(func() {
			buf := make([]byte, diskPiece)
			for ctx.Err() == nil {
				off := next.Add(diskPiece) - diskPiece
				if off >= size {
					return
				}
				if err := f(buf[:min(diskPiece, size-off)], off); err != nil {
					errs <- fmt.Errorf("at byte %d: %w", off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return 0, err
	default:
		return time.Since(begin), ctx.Err()
	}
}

// fillBlocks fills buf with what belongs at off: no two words of a disk are alike, so bytes that come from elsewhere are seen.
func fillBlocks(buf []byte, off uint64) {
	for i := 0; i+8 <= len(buf); i += 8 {
		binary.LittleEndian.PutUint64(buf[i:], traffic.Mix(off+uint64(i)))
	}
}

// wrongBytes counts the bytes that do not belong at off.
func wrongBytes(buf []byte, off uint64) (n uint64) {
	want := make([]byte, len(buf))
	fillBlocks(want, off)
	if bytes.Equal(buf, want) {
		return 0
	}
	for i := range buf {
		if buf[i] != want[i] {
			n++
		}
	}
	return n
}
