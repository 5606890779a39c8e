package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"github.com/boardlink/boardlink/nbd"
)

// BlockSize is the size of a checked block in bytes.
const BlockSize = 4096

// Config says how a disk is tried. All of its content is lost.
type Config struct {
	Path   string // of the socket
	Export string // "": the default one
	// Depth is how many requests are in flight at a time; 0: 16.
	Depth int
	// Blocks is how many blocks are used, from the first one on; 0: all of the disk, up to 64 MiB.
	Blocks int
	// Requests ends it after so many requests; 0: it goes on until the context ends.
	Requests uint64
	Seed     uint64
}

// Result is what was done.
type Result struct {
	Writes, Reads, Flushes, Zeroes uint64 // requests
	Bytes                          uint64 // written and read
	Wrong                          uint64 // blocks that were not what was written last
	First                          string // the first of them
}

// Checker writes a disk and knows what is on it.
type Checker struct {
	cfg Config
	c   *Client

	n counts

	mu    sync.Mutex // guards first
	first string

	blocks []block
}

type counts struct {
	requests, writes, reads, flushes, zeroes, bytes, wrong uint64 // sync/atomic
}

// block is what is on a block: zeros, or what version has.
type block struct {
	version uint64 // 0: zeros
	busy    uint32 // sync/atomic: a request is in flight
}

// New connects to the disk and makes it known: blocks are zeroed.
func New(cfg Config) (*Checker, error) {
	c, err := Dial(cfg.Path, cfg.Export)
	if err != nil {
		return nil, err
	}
	if cfg.Depth == 0 {
		cfg.Depth = 16
	}
	if n := int(min(c.Size, 64<<20) / BlockSize); cfg.Blocks == 0 {
		cfg.Blocks = n
	}
	if cfg.Blocks < cfg.Depth || uint64(cfg.Blocks)*BlockSize > c.Size {
		c.Close()
		return nil, fmt.Errorf("%d blocks of %d bytes on a disk of %d, with %d requests in flight", cfg.Blocks, BlockSize, c.Size, cfg.Depth)
	}
	k := &Checker{cfg: cfg, c: c, blocks: make([]block, cfg.Blocks)}
	const most = 4 << 20
	for off, end := uint64(0), uint64(cfg.Blocks)*BlockSize; off < end; off += most {
		n := min(most, end-off)
		if c.Flags&nbd.SendWriteZeroes != 0 {
			err = c.Zero(off, uint32(n))
		} else {
			err = c.Write(make([]byte, n), off, false)
		}
		if err != nil {
			c.Close()
			return nil, err
		}
	}
	return k, nil
}

// Close ends the connection.
func (k *Checker) Close() error { return k.c.Close() }

// fill writes what version v of block i is.
func fill(b []byte, i int, v uint64) {
	if v == 0 {
		clear(b)
		return
	}
	x := uint64(i)<<32 ^ v
	for off := 0; off < len(b); off += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b[off:], x)
	}
	binary.LittleEndian.PutUint64(b[8:], uint64(i))
	binary.LittleEndian.PutUint64(b[16:], v)
	binary.LittleEndian.PutUint32(b[0:], crc32.ChecksumIEEE(b[4:]))
}

// check compares what was read of block i with its version.
func (k *Checker) check(b []byte, i int, v uint64, want []byte) {
	fill(want, i, v)
	if string(b) == string(want) {
		return
	}
	what := "bytes that nobody wrote"
	if crc32.ChecksumIEEE(b[4:]) == binary.LittleEndian.Uint32(b) {
		what = fmt.Sprintf("version %d of block %d", binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[8:]))
	} else if zero := make([]byte, len(b)); string(zero) == string(b) {
		what = "zeros"
	}
	if atomic.AddUint64(&k.n.wrong, 1) == 1 {
		k.mu.Lock()
		k.first = fmt.Sprintf("block %d holds %s, want version %d", i, what, v)
		k.mu.Unlock()
	}
}

// Requests returns how many requests have been completed so far.
func (k *Checker) Requests() uint64 { return atomic.LoadUint64(&k.n.requests) }

// Result returns what has been done so far.
func (k *Checker) Result() Result {
	k.mu.Lock()
	defer k.mu.Unlock()
	return Result{Writes: atomic.LoadUint64(&k.n.writes), Reads: atomic.LoadUint64(&k.n.reads), Flushes: atomic.LoadUint64(&k.n.flushes),
		Zeroes: atomic.LoadUint64(&k.n.zeroes), Bytes: atomic.LoadUint64(&k.n.bytes), Wrong: atomic.LoadUint64(&k.n.wrong), First: k.first}
}

// Run writes and reads blocks at random until the context ends, or Config.Requests are done. Each block is checked whenever it is
// read. An error is one of a request, or of the connection.
func (k *Checker) Run(ctx context.Context) error {
	errs := make(chan error, k.cfg.Depth)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for w := 0; w < k.cfg.Depth; w++ {
		w := w
		go func() {
			err := k.work(ctx, rand.New(rand.NewPCG(k.cfg.Seed, uint64(w))))
			if err != nil {
				cancel()
			}
			errs <- err
		}()
	}
	var err error
	for w := 0; w < k.cfg.Depth; w++ {
		if e := <-errs; e != nil {
			err = errors.Join(err, e)
		}
	}
	return err
}

// work has one request in flight at a time, of a block that no other goroutine has.
func (k *Checker) work(ctx context.Context, r *rand.Rand) error {
	buf, want := make([]byte, 16*BlockSize), make([]byte, BlockSize)
	for ctx.Err() == nil {
		if m := k.cfg.Requests; m > 0 && atomic.LoadUint64(&k.n.requests) >= m {
			return nil
		}
		n := 1
		if r.IntN(8) == 0 {
			n = 1 + r.IntN(16)
		}
		first := r.IntN(k.cfg.Blocks)
		got := 0
		for got < n && first+got < k.cfg.Blocks && atomic.CompareAndSwapUint32(&k.blocks[first+got].busy, 0, 1) {
			got++
		}
		if got == 0 {
			continue
		}
		err := k.one(r, first, buf[:got*BlockSize], want)
		for i := first; i < first+got; i++ {
			atomic.StoreUint32(&k.blocks[i].busy, 0)
		}
		if err != nil {
			return err
		}
		atomic.AddUint64(&k.n.requests, 1)
	}
	return nil
}

// one does one request, of blocks that are this goroutine's.
func (k *Checker) one(r *rand.Rand, first int, b, want []byte) error {
	off, n := uint64(first)*BlockSize, len(b)/BlockSize
	switch op := r.IntN(64); {
	case op == 0:
		atomic.AddUint64(&k.n.flushes, 1)
		return k.c.Flush()
	case op == 1 && k.c.Flags&nbd.SendWriteZeroes != 0:
		for i := first; i < first+n; i++ {
			k.blocks[i].version = 0
		}
		atomic.AddUint64(&k.n.zeroes, 1)
		return k.c.Zero(off, uint32(len(b)))
	case op < 34:
		for i := 0; i < n; i++ {
			v := r.Uint64() | 1
			k.blocks[first+i].version = v
			fill(b[i*BlockSize:(i+1)*BlockSize], first+i, v)
		}
		atomic.AddUint64(&k.n.writes, 1)
		atomic.AddUint64(&k.n.bytes, uint64(len(b)))
		return k.c.Write(b, off, op == 2)
	}
	if err := k.c.Read(b, off); err != nil {
		return err
	}
	atomic.AddUint64(&k.n.reads, 1)
	atomic.AddUint64(&k.n.bytes, uint64(len(b)))
	for i := 0; i < n; i++ {
		k.check(b[i*BlockSize:(i+1)*BlockSize], first+i, k.blocks[first+i].version, want)
	}
	return nil
}

// Verify reads all blocks and checks them. Nothing else may run.
func (k *Checker) Verify() error { return k.VerifyBy(k.c.Read) }

// VerifyBy is Verify with another way to read, as from the image itself.
func (k *Checker) VerifyBy(read func(b []byte, off uint64) error) error {
	b, want := make([]byte, BlockSize), make([]byte, BlockSize)
	for i := range k.blocks {
		if err := read(b, uint64(i)*BlockSize); err != nil {
			return err
		}
		k.check(b, i, k.blocks[i].version, want)
	}
	return nil
}
