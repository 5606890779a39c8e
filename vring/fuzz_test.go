package vring_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// chain follows the chain of a head; left is how many descriptors of the ring it may take.
func (m *image) chain(desc uint64, size, head uint16, indirectOK bool, left *int) ([]piece, error) {
	out := &list{m: m, max: int(size)}
	if head >= size {
		return nil, errBad
	}
	read := func(b []byte) (addr uint64, n uint32, flags, next uint16) {
		return binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint16(b[12:]), binary.LittleEndian.Uint16(b[14:])
	}
	for i := head; ; {
		if *left == 0 {
			return nil, errBad
		}
		*left--
		addr, n, flags, next := read(m.b[desc+16*uint64(i):])
		if flags&4 != 0 {
			tab := m.table(addr, n, size)
			if flags&1 != 0 || !indirectOK || tab == nil {
				return nil, errBad
			}
			for k, steps := uint32(0), uint32(0); ; {
				addr, l, flags, next := read(tab[16*k:])
				if flags&4 != 0 || !out.add(addr, l, flags) {
					return nil, errBad
				}
				if flags&1 == 0 {
					return out.bufs, nil
				}
				if k = uint32(next); k >= n/16 {
					return nil, errBad
				}
				if steps++; steps == n/16 {
					return nil, errBad // more steps than entries: a loop
				}
			}
		}
		if !out.add(addr, n, flags) {
			return nil, errBad
		}
		if flags&1 == 0 {
			return out.bufs, nil
		}
		if i = next; i >= size {
			return nil, errBad
		}
	}
}

// FuzzSplitDevice: a driver side that writes anything anywhere, in any order of operations.
func FuzzSplitDevice(f *testing.F) {
	addSeeds(f)
	// Add two chains, pop, complete, arm, the way it ought to be.
	f.Add([]byte{3, 0, 0, 0, 0, 0x80, 10, 1, 1, 0, 1, 10, 0x80, 20, 2, 0, 2, 2, 0, 1, 4, 7, 8, 9, 5, 2})
	f.Fuzz(func(t *testing.T, data []byte) {
		in := &reader{data}
		log, cfg := in.u8(), in.u8()
		kind, across := fuzzKind(cfg)
		fr := newFuzzRig(t, split(vringtest.Memory{}, cfg&1 != 0, cfg&2 != 0), 1<<(log%7), kind, across)
		if cfg&16 != 0 {
			start := in.u16()
			fr.DevCfg.State = vring.State{Avail: start, Used: start}
			fr.availIdx(start)
		}
		d, err := vring.NewSplitDevice(fr.DevCfg)
		if err != nil {
			t.Fatal(err)
		}
		size := fr.Size
		seen := d.State().Avail // as the device side last saw the index
		var broken error
		var held []vring.Chain
		_, _, deviceLen := vring.SplitSizes(size)
		// outside is the memory that the device side may not write.
		outside := func(b []byte) ([]byte, []byte) {
			return b[:fr.DeviceOff], b[fr.DeviceOff+deviceLen:]
		}
		// jump mirrors the check of the index.
		jump := func(im *image, s vring.State) bool {
			if seen != s.Avail {
				return false
			}
			idx := binary.LittleEndian.Uint16(im.b[fr.DriverOff+2:])
			if uint32(idx-s.Avail)+uint32(s.Avail-s.Used) > uint32(size) {
				return true
			}
			seen = idx
			return false
		}
		for ops := 0; in.more() && ops < 300; ops++ {
			im := fr.image()
			s := d.State()
			switch op := in.u8() % 13; op {
			case 0, 1:
				fr.someDesc(in, fr.DescOff+16*uint64(uint16(in.u8())%size))
				continue
			case 2:
				idx := fr.getAvailIdx()
				fr.entry(idx, in.u16()%(size+size/4+1))
				fr.availIdx(idx + 1)
				continue
			case 3:
				fr.availIdx(fr.getAvailIdx() + uint16(int8(in.u8())))
				continue
			case 4, 10:
				max := int(in.u8()%16) + 1
				var b vring.Batch
				n, err := d.Pop(&b, max)
				if broken != nil {
					popFailed(t, n, err, broken)
					break
				}
				wantErr := jump(im, s)
				var want [][]piece
				left := int(size)
				spans := 0
				for i := s.Avail; !wantErr && i != seen && len(want) < max && spans < int(size); i++ {
					head := binary.LittleEndian.Uint16(im.b[fr.DriverOff+4+2*uint64(i&(size-1)):])
					c, err := im.chain(fr.DescOff, size, head, cfg&2 != 0, &left)
					if err != nil {
						wantErr = true
						break
					}
					spans += len(c)
					want = append(want, c)
				}
				if n != len(want) || n != len(b.Chains) || (err != nil) != wantErr {
					t.Fatalf("Pop(%d) = %d, %v, want %d, error %v", max, n, err, len(want), wantErr)
				}
				for i, c := range b.Chains {
					if !same(c, b.Spans, want[i]) {
						t.Fatalf("chain %d: %+v of %+v, want %+v", i, c, b.Spans, want[i])
					}
				}
				if err != nil {
					popFailed(t, n, err, nil)
				}
				held = append(held, b.Chains...)
				broken = err
			case 5:
				k := int(in.u8()) % (len(held) + 1)
				var used []vring.Used
				for _, c := range held[:k] {
					used = append(used, vring.Used{ID: c.ID, Len: c.WriteLen})
				}
				if err := d.Complete(used); broken != nil {
					if err != broken {
						t.Fatal(err)
					}
					break
				} else if err != nil {
					t.Fatal(err)
				}
				held = held[k:]
				for i, u := range used {
					if id, n := fr.getUsed(s.Used + uint16(i)); id != uint32(u.ID) || n != u.Len {
						t.Fatalf("used element %d, %d, want %+v", id, n, u)
					}
				}
				if got := fr.getUsedIdx(); k > 0 && got != s.Used+uint16(k) {
					t.Fatalf("used index %d", got)
				}
			case 6:
				k := int(in.u8()) % (len(held) + 1)
				d.Unpop(k)
				if broken == nil {
					held = held[:len(held)-k]
				}
			case 7:
				pending, err := d.ArmKick()
				if broken != nil {
					if err != broken || pending {
						t.Fatal(pending, err)
					}
					break
				}
				wantErr := jump(im, s)
				if (err != nil) != wantErr || err == nil && pending != (seen != s.Avail) {
					t.Fatalf("ArmKick = %v, %v", pending, err)
				}
				broken = err
			case 8, 9:
				deviceOp(t, d, op, broken)
			case 11:
				fr.someDesc(in, fr.Payload+uint64(in.u8())*7)
				continue
			case 12:
				// A byte anywhere but in the device's own area, which it need not write anew.
				if off := uint64(in.u16()) % uint64(len(fr.mem)); off < fr.DeviceOff || off >= fr.DeviceOff+deviceLen {
					fr.mem[off] = in.u8()
				}
				continue
			}
			lo0, hi0 := outside(im.b)
			lo1, hi1 := outside(fr.mem)
			if !bytes.Equal(lo0, lo1) || !bytes.Equal(hi0, hi1) {
				t.Fatal("the device side wrote outside its area")
			}
			if v := d.State(); v.Avail-v.Used != uint16(len(held)) {
				t.Fatalf("state %+v with %d held", v, len(held))
			}
			if d.Broken() != broken {
				t.Fatalf("Broken() = %v, want %v", d.Broken(), broken)
			}
		}
	})
}

// FuzzSplitDriver: a device side that writes anything anywhere.
func FuzzSplitDriver(f *testing.F) {
	addSeeds(f)
	f.Add([]byte{3, 0, 0, 2, 1, 2, 0, 0, 1, 1, 3, 2, 1, 2, 0, 5, 5, 4, 9})
	f.Fuzz(func(t *testing.T, data []byte) {
		in := &reader{data}
		log, cfg := in.u8(), in.u8()
		kind, across := fuzzKind(cfg)
		fr := newFuzzRig(t, split(vringtest.Memory{}, cfg&1 != 0, cfg&2 != 0), 1<<(log%7), kind, across)
		fr.DrvCfg.Device.Region.Across = cfg&32 != 0 // of the driver side's region
		start := uint16(0)
		if cfg&16 != 0 {
			start = in.u16()
			fr.DrvCfg.State = vring.State{Avail: start, Used: start}
		}
		d, err := vring.NewSplitDriver(fr.DrvCfg)
		if err != nil {
			t.Fatal(err)
		}
		size := fr.Size
		flying := map[uint16]flight{} // by head
		seen, token, free := start, uint32(0), int(size)
		var broken error
		_, _, deviceLen := vring.SplitSizes(size)
		jump := func(s vring.State) bool {
			if seen != s.Used {
				return false
			}
			idx := fr.getUsedIdx()
			if idx-s.Used > s.Avail-s.Used {
				return true
			}
			seen = idx
			return false
		}
		for ops := 0; in.more() && ops < 300; ops++ {
			s := d.State()
			switch op := in.u8() % 11; op {
			case 0, 1:
				q, fl := fr.someRequest(in, token)
				got, err := d.Add([]vring.Request{q})
				switch {
				case fr.refused(t, q, got, err, broken):
				case cfg&64 != 0: // what comes back is not followed: only that it stays sane
					if got > 1 || err != nil {
						t.Fatal(got, err)
					}
					token++
				case fl.descs > free:
					if got != 0 || err != nil {
						t.Fatal(got, err)
					}
				default:
					if got != 1 || err != nil {
						t.Fatal(got, err)
					}
					head := uint16(0)
					if size > 1 {
						head = fr.getEntry(s.Avail)
					}
					if _, dup := flying[head]; dup || head >= size {
						t.Fatalf("head %d is in flight", head)
					}
					flying[head] = fl
					token++
					free -= fl.descs
				}
			case 2:
				// A used element: of a chain in flight, or not.
				id, n := uint32(in.u8()), uint32(in.u8())
				if fl, ok := flying[uint16(id)]; ok && n > 200 {
					n = fl.writable
				}
				if id > 250 {
					id = ^uint32(0) - id
				}
				idx := fr.getUsedIdx()
				fr.used(idx, id, n)
				fr.usedIdx(idx + 1)
			case 3:
				fr.usedIdx(fr.getUsedIdx() + uint16(int8(in.u8())))
			case 4, 5:
				done := make([]vring.Completion, int(in.u8()%8)+1)
				n, err := d.Reap(done)
				if broken != nil {
					if n != 0 || err != broken {
						t.Fatal(n, err)
					}
					break
				}
				if cfg&64 != 0 {
					broken = err
					break
				}
				wantErr := jump(s)
				want := 0
				for i := s.Used; !wantErr && i != seen && want < len(done); i++ {
					id, l := fr.getUsed(i)
					fl, ok := flying[uint16(id)]
					if id >= uint32(size) || !ok || l > fl.writable {
						wantErr = true
						break
					}
					if want < n && done[want] != (vring.Completion{Token: fl.token, Len: l}) {
						t.Fatalf("completion %+v, want %+v, length %d", done[want], fl, l)
					}
					delete(flying, uint16(id))
					free += fl.descs
					want++
				}
				if n != want || (err != nil) != wantErr {
					t.Fatalf("Reap(%d) = %d, %v, want %d, error %v", len(done), n, err, want, wantErr)
				}
				broken = err
			case 6:
				after := int(in.u8() % 8)
				pending, err := d.ArmCallAfter(after)
				if broken != nil {
					if pending || err != broken {
						t.Fatal(pending, err)
					}
					break
				}
				broken = err
				if cfg&64 != 0 {
					break
				}
				if inflight := int(s.Avail - s.Used); after > inflight {
					after = inflight
				}
				if after < 1 || cfg&1 == 0 {
					after = 1
				}
				if int(seen-s.Used) >= after {
					if !pending || err != nil {
						t.Fatal(pending, err)
					}
					break
				}
				idx := fr.getUsedIdx()
				if idx-s.Used > s.Avail-s.Used || idx-s.Used < seen-s.Used {
					if !errors.Is(err, vring.ErrUsedJump) {
						t.Fatal(pending, err)
					}
					break
				}
				if seen = idx; err != nil || pending != (int(seen-s.Used) >= after) {
					t.Fatal(pending, err)
				}
			case 7, 8:
				driverOp(t, d, op, broken)
			case 9:
				// A byte in the device area.
				fr.mem[fr.DeviceOff+uint64(in.u16())%deviceLen] = in.u8()
			case 10:
				// A byte in what is the driver's: nobody may mind. The entries of the
				// ring are left alone where the test itself reads them.
				off := uint64(in.u16()) % fr.DriverOff
				if cfg&64 != 0 {
					off = uint64(in.u16()) % uint64(len(fr.mem))
				}
				fr.mem[off] = in.u8()
			}
			if cfg&64 == 0 && d.Free() != free {
				t.Fatalf("%d free, want %d", d.Free(), free)
			}
			if d.Free() < 0 || d.Free() > int(size) {
				t.Fatalf("%d free of %d", d.Free(), size)
			}
			if d.Broken() != broken {
				t.Fatalf("Broken() = %v, want %v", d.Broken(), broken)
			}
		}
	})
}

// FuzzIndirect: an indirect table of any bytes, length and alignment, behind up to two
// descriptors of the ring.
func FuzzIndirect(f *testing.F) {
	entry := func(off uint16, n uint32, flags, nxt uint16) []byte {
		b := make([]byte, 16)
		binary.LittleEndian.PutUint64(b, uint64(vringtest.Base)+uint64(off))
		binary.LittleEndian.PutUint32(b[8:], n)
		binary.LittleEndian.PutUint16(b[12:], flags)
		binary.LittleEndian.PutUint16(b[14:], nxt)
		return b
	}
	f.Add(entry(0, 1, 0, 0), uint32(16), uint8(0), uint8(0))
	f.Add(append(entry(0, 1, 1, 1), entry(16, 8, 2, 0)...), uint32(32), uint8(3), uint8(1))
	f.Add(append(entry(0, 1, 1, 1), entry(16, 8, 1, 0)...), uint32(32), uint8(8), uint8(2))
	f.Add(append(entry(0, 1, 3, 1), entry(16, 8, 0, 0)...), uint32(32), uint8(0), uint8(0)) // readable behind writable
	f.Add(entry(0, 1, 4, 0), uint32(16), uint8(1), uint8(4))
	f.Add(append(entry(0, 1, 1, 5), entry(16, 8, 2, 0)...), uint32(32), uint8(0), uint8(0))
	f.Add(entry(0, 0, 0, 0), uint32(15), uint8(0), uint8(8))
	f.Fuzz(func(t *testing.T, table []byte, length uint32, shift, cfg uint8) {
		kinds := [4]mmio.Kind{mmio.Cached, mmio.Uncached, mmio.WriteCombining, mmio.Cached}
		fr := newFuzzRig(t, split(vringtest.Memory{}, true, true), 16, kinds[cfg&3], cfg&3 != 0)
		d, err := vring.NewSplitDevice(fr.DevCfg)
		if err != nil {
			t.Fatal(err)
		}
		copy(fr.mem[fr.Payload+uint64(shift):], table)
		before := int(cfg>>2) % 3
		for i := 0; i < before; i++ {
			flags := uint16(next)
			if cfg&128 != 0 && i == 1 {
				flags |= write
			}
			fr.desc(uint16(i), fr.Addr(0), uint32(i)+1, flags, uint16(i)+1)
		}
		flags := uint16(indirect)
		if cfg&64 != 0 {
			flags |= write
		}
		fr.desc(uint16(before), fr.Addr(uint64(shift)), length, flags, 0)
		fr.availIdx(1)
		im := fr.image()
		left := int(fr.Size)
		want, werr := im.chain(fr.DescOff, fr.Size, 0, true, &left)
		var b vring.Batch
		n, err := d.Pop(&b, 1)
		if (err != nil) != (werr != nil) || n != len(b.Chains) || (n == 1) != (werr == nil) {
			t.Fatalf("Pop = %d, %v, want %v", n, err, werr)
		}
		if n == 1 && !same(b.Chains[0], b.Spans, want) {
			t.Fatalf("chain %+v of %+v, want %+v", b.Chains[0], b.Spans, want)
		}
	})
}
