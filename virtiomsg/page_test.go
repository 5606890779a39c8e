package virtiomsg

import (
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// goldenPage reads testdata/linkpage.hex: lines of "offset: bytes", what is not named is zero.
func goldenPage(t testing.TB) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/linkpage.hex")
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, PageSize)
	for _, line := range strings.Split(string(text), "\n") {
		line, _, _ = strings.Cut(line, "#")
		off, data, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		o, err := hex.DecodeString(strings.TrimSpace(off))
		if err != nil || len(o) != 2 {
			t.Fatalf("%q: %v", line, err)
		}
		b, err := hex.DecodeString(strings.Join(strings.Fields(data), ""))
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		copy(page[int(o[0])<<8|int(o[1]):], b)
	}
	return page
}

func goldenDeclarations() (agent, host Declaration) {
	agent = Declaration{WindowSize: 0x10000, Features: 0, Ring: board.RingInfo{Method: board.RingIvshmem, Peer: 3, Vectors: 5},
		FIFOAgentToHost: 0x1000, FIFOHostToAgent: 0x2000, SlotsAgentToHost: 62, SlotsHostToAgent: 61,
		Regions: []Region{{Addr: 0x1280003000, Size: 0xd000, Offset: 0x3000, Access: dma.DeviceRead | dma.DeviceWrite}}}
	host = Declaration{WindowSize: 0x20000, Features: 0, Ring: board.RingInfo{Method: board.RingRegister, Vectors: 2, Value: 0x4021, Addr: 0xfee0100c},
		Pool: []PoolRegion{{Link: 0x7000000000, Size: 0x200000, Bus: 0x3f00000000, Access: dma.DeviceRead},
			{Link: 0x7100000000, Size: 0x40, Bus: 0x3f10000040, Access: dma.DeviceWrite}}}
	return agent, host
}

// TestGoldenPage holds the link page of a running link against its bytes.
func TestGoldenPage(t *testing.T) {
	words := make([]uint64, 0x20000/8)
	b := bytesOf(words)
	win := dma.Region{Mem: mmio.FromBytes(b)}
	da, dh := goldenDeclarations()
	seed := func(v uint32) func() (uint32, error) { return func() (uint32, error) { return v, nil } }
	wa := win
	wa.Mem, _ = win.Mem.Slice(0, 0x10000)
	a := mustLink(t, LinkConfig{Window: wa, Side: board.Agent, Self: da, Rand: seed(0x11111111)})
	h := mustLink(t, LinkConfig{Window: win, Side: board.Host, Self: dh, Rand: seed(0x22222222)})
	a.Start()
	h.Start()
	rung(t, a, h)
	a.Poll(true)
	a.Poll(true)
	h.Poll(true)
	want := goldenPage(t)
	for o := 0; o < PageSize; o += 16 {
		if g, w := hex.EncodeToString(b[o:o+16]), hex.EncodeToString(want[o:o+16]); g != w {
			t.Errorf("%04x: %s, want %s", o, g, w)
		}
	}
	for side, d := range map[board.Side]Declaration{board.Agent: da, board.Host: dh} {
		copy(b, want)
		got, err := ReadBlock(win, side)
		if err != nil {
			t.Fatal(err)
		}
		if got.State != StateRunning || got.Epoch == 0 || got.Echo == 0 || got.Heartbeat == 0 {
			t.Errorf("%+v", got)
		}
		g := got.Declaration
		if g.Major != 1 || g.Minor != 0 || encodeBlock(side, &g) != encodeBlock(side, &d) {
			t.Errorf("%+v, want %+v", g, d)
		}
	}
}

// TestGoldenFeatures: no features of the link are defined yet, so that the golden page shows none; the word is held against
// bytes here.
func TestGoldenFeatures(t *testing.T) {
	da, _ := goldenDeclarations()
	da.Features = 0x01020304
	b := encodeBlock(board.Agent, &da)
	if got := hex.EncodeToString(b[offFeatures : offFeatures+4]); got != "04030201" {
		t.Errorf("written as %s", got)
	}
	words := make([]uint64, 0x20000/8)
	mem := bytesOf(words)
	copy(mem, goldenPage(t))
	copy(mem[blockOff(board.Agent)+offFeatures:], []byte{4, 3, 2, 1})
	got, err := ReadBlock(dma.Region{Mem: mmio.FromBytes(mem)}, board.Agent)
	if err != nil || got.Declaration.Features != 0x01020304 {
		t.Errorf("read as %#x, %v", got.Declaration.Features, err)
	}
}

func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		side board.Side
		edit func(*Declaration)
		want error
	}{
		"fine agent":                {board.Agent, func(d *Declaration) {}, nil},
		"fine host":                 {board.Host, func(d *Declaration) {}, nil},
		"agent's window too large":  {board.Agent, func(d *Declaration) { d.WindowSize = 0x10001 }, ErrWindowSize},
		"no window":                 {board.Agent, func(d *Declaration) { d.WindowSize = 0 }, ErrWindowSize},
		"host's window too small":   {board.Host, func(d *Declaration) { d.WindowSize = 0xffff }, ErrWindowSize},
		"unknown ring":              {board.Host, func(d *Declaration) { d.Ring.Method = 4 }, ErrRing},
		"no vectors":                {board.Host, func(d *Declaration) { d.Ring.Vectors = 0 }, ErrRing},
		"many vectors":              {board.Host, func(d *Declaration) { d.Ring.Vectors = 0x10001 }, ErrRing},
		"odd ring address":          {board.Host, func(d *Declaration) { d.Ring.Addr++ }, ErrRing},
		"polling":                   {board.Host, func(d *Declaration) { d.Ring = board.RingInfo{} }, nil},
		"FIFO misaligned":           {board.Agent, func(d *Declaration) { d.FIFOAgentToHost += 64 }, ErrAlign},
		"FIFO on the link page":     {board.Agent, func(d *Declaration) { d.FIFOHostToAgent = 0 }, ErrOverlap},
		"FIFOs on each other":       {board.Agent, func(d *Declaration) { d.FIFOHostToAgent = d.FIFOAgentToHost }, ErrOverlap},
		"FIFO outside":              {board.Agent, func(d *Declaration) { d.FIFOHostToAgent = 0x10000 }, ErrOutside},
		"FIFO far outside":          {board.Agent, func(d *Declaration) { d.FIFOHostToAgent = 0xfffffffffffff000 }, ErrOutside},
		"no slots":                  {board.Agent, func(d *Declaration) { d.SlotsHostToAgent = 0 }, ErrCount},
		"63 slots":                  {board.Agent, func(d *Declaration) { d.SlotsAgentToHost = 63 }, ErrCount},
		"9 regions":                 {board.Agent, func(d *Declaration) { d.Regions = make([]Region, 9) }, ErrCount},
		"no regions":                {board.Agent, func(d *Declaration) { d.Regions = nil }, nil},
		"region on a FIFO":          {board.Agent, func(d *Declaration) { d.Regions[0].Offset = 0x2000; d.Regions[0].Size = 0x40 }, ErrOverlap},
		"region on the link page":   {board.Agent, func(d *Declaration) { d.Regions[0].Offset = 0xfc0; d.Regions[0].Size = 0x40 }, ErrOverlap},
		"region outside":            {board.Agent, func(d *Declaration) { d.Regions[0].Size += 64 }, ErrOutside},
		"region far outside":        {board.Agent, func(d *Declaration) { d.Regions[0].Offset = 0xffffffffffffffc0 }, ErrOutside},
		"huge region":               {board.Agent, func(d *Declaration) { d.Regions[0].Size = 0xffffffffffffffc0 }, ErrOutside},
		"region past 2^64":          {board.Agent, func(d *Declaration) { d.Regions[0].Addr = 0xffffffffffffffc0 }, ErrOutside},
		"empty region":              {board.Agent, func(d *Declaration) { d.Regions[0].Size = 0 }, ErrAlign},
		"region size odd":           {board.Agent, func(d *Declaration) { d.Regions[0].Size = 63 }, ErrAlign},
		"region address odd":        {board.Agent, func(d *Declaration) { d.Regions[0].Addr++ }, ErrAlign},
		"region offset odd":         {board.Agent, func(d *Declaration) { d.Regions[0].Offset += 8 }, ErrAlign},
		"region without access":     {board.Agent, func(d *Declaration) { d.Regions[0].Access = 0 }, ErrAccess},
		"region with more access":   {board.Agent, func(d *Declaration) { d.Regions[0].Access = 4 }, ErrAccess},
		"regions in the same place": {board.Agent, func(d *Declaration) { d.Regions = append(d.Regions, Region{0x1000, 64, 0xffc0, 1}) }, ErrOverlap},
		"regions with one address": {board.Agent, func(d *Declaration) {
			d.Regions[0].Size = 0x40
			d.Regions = append(d.Regions, Region{d.Regions[0].Addr, 64, 0xffc0, 1})
		}, ErrOverlap},
		"9 pools":                  {board.Host, func(d *Declaration) { d.Pool = make([]PoolRegion, 9) }, ErrCount},
		"pools on each other":      {board.Host, func(d *Declaration) { d.Pool[1].Link = d.Pool[0].Link + 64 }, ErrOverlap},
		"pools on one bus address": {board.Host, func(d *Declaration) { d.Pool[1].Bus = d.Pool[0].Bus }, ErrOverlap},
		"pool bus address odd":     {board.Host, func(d *Declaration) { d.Pool[1].Bus++ }, ErrAlign},
		"pool past 2^64":           {board.Host, func(d *Declaration) { d.Pool[0].Bus = 0xffffffffffffffc0 }, ErrOutside},
		"pool link past 2^64":      {board.Host, func(d *Declaration) { d.Pool[0].Link = 0xffffffffffffffc0 }, ErrOutside},
		"pool without access":      {board.Host, func(d *Declaration) { d.Pool[0].Access = 0 }, ErrAccess},
	} {
		t.Run(name, func(t *testing.T) {
			a, h := goldenDeclarations()
			d := &a
			if c.side == board.Host {
				d = &h
			}
			c.edit(d)
			err := d.Check(c.side, 0x10000)
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			var pe *PageError
			if c.want != nil && (!errors.As(err, &pe) || pe.Side != c.side || pe.Field == "" || pe.Why == "") {
				t.Errorf("%#v", err)
			}
		})
	}
}

// TestReadBlock spoils single words of a good page.
func TestReadBlock(t *testing.T) {
	for name, c := range map[string]struct {
		side board.Side
		off  uint64
		v    uint32
		want error
	}{
		"magic":            {board.Agent, 0x00, 0, ErrMagic},
		"big-endian magic": {board.Agent, 0x00, 0x424c4e4b, ErrMagic},
		"magic all-ones":   {board.Agent, 0x00, 0xffffffff, ErrMagic},
		"major":            {board.Agent, 0x04, 2, ErrVersion},
		"major 0":          {board.Host, 0x804, 0, ErrVersion},
		"minor":            {board.Agent, 0x04, 0x00090001, nil},
		"side":             {board.Host, 0x808, 1, ErrSide},
		"short block":      {board.Agent, 0x0c, 0x1fc, ErrBlockLength},
		"long block":       {board.Agent, 0x0c, 0x801, ErrBlockLength},
		"longer block":     {board.Agent, 0x0c, 0x800, nil},
		"window":           {board.Agent, 0x14, 1, ErrWindowSize},
		"features":         {board.Agent, 0x18, 0xffff, nil},
		"regions":          {board.Agent, 0xc0, 9, ErrCount},
		"many regions":     {board.Agent, 0xc0, 0xffffffff, ErrCount},
		"entry size":       {board.Agent, 0xc4, 40, ErrCount},
		"access":           {board.Agent, 0x118, 0x103, ErrAccess},
		"pool access":      {board.Host, 0x918, 0x103, ErrAccess},
		"reserved":         {board.Agent, 0x1c, 0xdead, nil},
	} {
		t.Run(name, func(t *testing.T) {
			words := make([]uint64, 0x10000/8)
			copy(bytesOf(words), goldenPage(t))
			win := dma.Region{Mem: mmio.FromBytes(bytesOf(words)), Across: true}
			win.Mem.Store32(c.off, c.v)
			if _, err := ReadBlock(win, c.side); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	words := make([]uint64, PageSize/8)
	win := dma.Region{Mem: mmio.FromBytes(bytesOf(words)), Across: true}
	if b, err := ReadBlock(win, board.Agent); err != nil || b.Epoch != 0 {
		t.Error("nobody there:", b, err)
	}
	for i := range words {
		words[i] = ^uint64(0)
	}
	if _, err := ReadBlock(win, board.Agent); err != ErrLinkGone {
		t.Error(err)
	}
}

// guardBus is a window that notes what is written, and fails on a write that is not the given side's.
type guardBus struct {
	t     testing.TB
	mem   []byte
	spoil func(off uint64, width uint, v uint64) uint64
	ok    func(off uint64) bool
}

func (b *guardBus) Load(off uint64, width uint) uint64 {
	v := get(b.mem[off:], width)
	if b.spoil != nil {
		v = b.spoil(off, width, v)
	}
	return v
}

func (b *guardBus) Store(off uint64, width uint, v uint64) {
	if !b.ok(off) {
		b.t.Fatalf("wrote to offset %#x", off)
	}
	put(b.mem[off:], width, v)
}

func (b *guardBus) Barrier(mmio.Barrier) {}

// FuzzHostilePeer: whatever a peer writes into its block and the FIFOs, at any time, a Link neither
// panics nor writes outside its own words, and each Poll comes to an end.
func FuzzHostilePeer(f *testing.F) {
	page := goldenPage(f)
	f.Add(true, page[:0x200], []byte{1, 2, 3, 4, 5, 6, 7, 8})
	f.Add(false, page[0x800:0xa00], []byte{9, 9, 9, 0x40, 0, 0, 0, 0, 1, 2, 3})
	f.Add(true, []byte{}, []byte{0})
	f.Fuzz(func(t *testing.T, host bool, block, script []byte) {
		side := board.Agent
		if host {
			side = board.Host
		}
		da, dh := goldenDeclarations()
		mem := make([]byte, 0x10000)
		peer := mem[blockOff(side.Other()):]
		copy(peer[:blockSize], block)
		own := blockOff(side)
		var l *Link
		bus := &guardBus{t: t, mem: mem}
		bus.ok = func(off uint64) bool {
			if off >= own && off < own+blockSize {
				return true
			}
			if off < PageSize || l == nil {
				return false
			}
			// Outside the blocks: own index words, and slots of the own FIFO, wherever the agent has
			// declared them.
			d := da
			if host {
				d, _ = l.Peer()
			}
			tx, rx := d.FIFOAgentToHost, d.FIFOHostToAgent
			if host {
				tx, rx = rx, tx
			}
			return off == tx+fifoHead || off == rx+fifoTail || off >= tx+fifoSlots && off < tx+PageSize
		}
		at := 0
		next := func() byte {
			if at >= len(script) {
				return 0
			}
			at++
			return script[at-1]
		}
		c := LinkConfig{Window: dma.Region{Mem: mmio.NewBusMem(bus, 0x10000, mmio.Uncached), Across: host}, Side: side, Self: da,
			Rand: func() (uint32, error) { return 5, nil }}
		if host {
			c.Self = dh
			c.Self.WindowSize = 0
		}
		var err error
		if l, err = NewLink(c); err != nil {
			t.Fatal(err)
		}
		if err := l.Start(); err != nil {
			t.Fatal(err)
		}
		var m Slot
		for i := 0; i < 200 && at < len(script); i++ {
			switch op := next(); op % 10 {
			case 0:
				o := int(next())%(blockLen/4)*4 + 0
				put(peer[o:], 4, uint64(next())<<24|uint64(next()))
			case 1: // echo it, as a good peer would
				put(peer[offEcho:], 4, uint64(l.Epoch()))
			case 2:
				put(peer[offEpoch:], 4, uint64(next()))
			case 3:
				for _, o := range []int{0x1000, 0x1040, 0x2000, 0x2040} {
					put(mem[o:], 4, uint64(int8(next())))
				}
			case 4:
				_, _ = l.Recv(&m)
				_, _ = m.Header()
			case 5:
				_ = l.Send(&m)
			case 6:
				_ = l.Quiesced()
			case 7: // words change between two reads
				n := next()
				bus.spoil = func(off uint64, width uint, v uint64) uint64 {
					if n > 0 && off >= blockOff(side.Other()) && off < blockOff(side.Other())+blockSize {
						if n--; n == 0 {
							return v ^ 1<<(uint(op)%(8*width))
						}
					}
					return v
				}
			default:
				_, _ = l.Poll(op&0x10 != 0)
			}
		}
	})
}

// FuzzFIFO: a consumer never takes more than there can be, whatever the head says.
func FuzzFIFO(f *testing.F) {
	f.Add(uint32(3), []byte{1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0})
	f.Add(uint32(62), []byte{62, 0, 0, 0, 0, 0, 0, 0})
	f.Add(uint32(1), []byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, slots uint32, heads []byte) {
		w, _ := newWindow(0x2000)
		c, err := NewConsumer("fuzz", w, 0x1000, slots)
		if err != nil {
			if slots >= 1 && slots <= MaxSlots {
				t.Fatal(err)
			}
			return
		}
		p, err := NewProducer("fuzz", w, 0x1000, slots)
		if err != nil {
			t.Fatal(err)
		}
		c.Reset()
		p.Reset()
		var m Slot
		var last uint32
		for ; len(heads) >= 4; heads = heads[4:] {
			head := uint32(get(heads, 4))
			w.Mem.Store32(0x1000+fifoHead, head)
			n := uint32(0)
			for {
				ok, err := c.Get(&m)
				if err != nil {
					if head >= last && head-last <= slots {
						t.Fatalf("head %d after %d refused: %v", head, last, err)
					}
					return
				}
				if !ok {
					break
				}
				if n++; n > slots {
					t.Fatal("more messages than slots")
				}
			}
			if head-last != n || w.Mem.Load32(0x1000+fifoTail) != head {
				t.Fatalf("head moved from %d to %d, %d messages", last, head, n)
			}
			last = head
			// The producer meets the same words as a hostile tail.
			w.Mem.Store32(0x1000+fifoTail, uint32(get(heads, 4)))
			_ = p.Put(&m)
			w.Mem.Store32(0x1000+fifoTail, last)
			w.Mem.Store32(0x1000+fifoHead, last)
		}
	})
}
