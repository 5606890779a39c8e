package vring_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// newPackedFuzzRig makes the rig that a program asks for, of 1 to 64 descriptors.
func newPackedFuzzRig(t testing.TB, size, cfg uint8) *fuzzRig {
	kind, across := fuzzKind(cfg)
	p := packed(vringtest.Memory{}, cfg&1 != 0, cfg&2 != 0)
	p.InOrder = cfg&64 != 0
	return newFuzzRig(t, p, uint16(size)%64+1, kind, across)
}

// packedList reads the list at position at of a packed ring from the specification alone: its buffers, its id, and the
// descriptors that it takes; nil where there is none. free is how many descriptors it may take.
func (m *image) packedList(desc uint64, size, at, free uint16, indirectOK bool, taken map[uint16]bool) (bufs []piece, id, count uint16, err error) {
	out := &list{m: m}
	for {
		if count == free && count > 0 {
			return nil, 0, 0, errBad
		}
		b := m.b[desc+16*uint64(at&^wrap):]
		addr, n := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[8:])
		flags := binary.LittleEndian.Uint16(b[14:])
		id = binary.LittleEndian.Uint16(b[12:])
		lap := at&wrap != 0
		if (flags&pAvail != 0) != lap || (flags&pUsed != 0) == lap {
			if count == 0 {
				return nil, 0, 0, nil
			}
			return nil, 0, 0, errBad
		}
		if free == 0 {
			return nil, 0, 0, errBad // made available again
		}
		count++
		if at++; at&^wrap == size {
			at = at&wrap ^ wrap
		}
		if flags&4 != 0 {
			tab := m.table(addr, n, size)
			if flags&1 != 0 || count > 1 || !indirectOK || tab == nil {
				return nil, 0, 0, errBad
			}
			for ; len(tab) > 0; tab = tab[16:] {
				if !out.add(binary.LittleEndian.Uint64(tab), binary.LittleEndian.Uint32(tab[8:]), binary.LittleEndian.Uint16(tab[14:])) {
					return nil, 0, 0, errBad
				}
			}
		} else if !out.add(addr, n, flags) {
			return nil, 0, 0, errBad
		}
		if flags&1 == 0 {
			if id >= size || taken[id] {
				return nil, 0, 0, errBad
			}
			return out.bufs, id, count, nil
		}
	}
}

// addPackedSeeds adds programs that go around the ring: descriptors one after the other, with all ops in turn.
func addPackedSeeds(f *testing.F) {
	addSeeds(f)
	for cfg := byte(0); cfg < 16; cfg++ {
		for _, size := range []byte{0, 2, 6} {
			b := []byte{size, cfg | 64*(cfg&1)}
			for i := 0; i < 60; i++ {
				b = append(b, 1, byte(i), 0x80, 30, byte(i)%size1(size), byte(i%3)&1, 4, 8, 5, 3, 9, 7, 3)
			}
			f.Add(b)
		}
	}
}

func size1(size byte) byte { return size%64 + 1 }

// FuzzPackedDevice: a driver side that writes anything anywhere, in any order of operations.
func FuzzPackedDevice(f *testing.F) {
	addPackedSeeds(f)
	// Indirect tables of two entries, good and bad.
	for _, cfg := range []byte{2, 3, 2 | 8, 2 | 12} {
		for _, flags := range []byte{4, 5, 6} {
			f.Add([]byte{6, cfg, 12, 0, 0, 0x80, 10, 0, 0, 12, 1, 5, 0x80, 20, 2, 1, 0, 0, 0x80, 102, flags, 3, 4, 8, 5, 1, 0, 7, 9, 12, 0, 0, 0x80, 10, 2, 0, 0, 0, 0x80, 102, flags, 3, 4, 8})
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		in := &reader{data}
		fsize, cfg := in.u8(), in.u8()
		fr := newPackedFuzzRig(t, fsize, cfg)
		size := fr.Size
		if cfg&16 != 0 {
			fr.DevCfg.State = vringtest.Packed.Start(size, in.u16())
		}
		d, err := vring.NewPackedDevice(fr.DevCfg)
		if err != nil {
			t.Fatal(err)
		}
		var held []vring.Chain
		taken := map[uint16]bool{}
		at := d.State().Avail // where the fuzzer makes descriptors available
		var broken error
		for ops := 0; in.more() && ops < 300; ops++ {
			im := fr.image()
			s := d.State()
			flying := uint16(0)
			for _, c := range held {
				flying += c.Count
			}
			switch op := in.u8() % 13; op {
			case 0, 1, 2: // the next descriptor in order, marked as it ought to be, or nearly so
				off := fr.DescOff + 16*uint64(at&^wrap)
				fr.someDesc(in, off)
				// someDesc wrote flags and next where a packed descriptor has id and flags.
				w := binary.LittleEndian.Uint32(fr.mem[off+12:])
				id, flags := uint16(w>>16), uint16(w)&7
				mark := uint16(pUsed)
				if at&wrap != 0 {
					mark = pAvail
				}
				if op == 2 {
					mark ^= uint16(in.u8()) << 8
				}
				binary.LittleEndian.PutUint32(fr.mem[off+12:], uint32(id)|uint32(flags|mark)<<16)
				if at++; at&^wrap == size {
					at = at&wrap ^ wrap
				}
				continue
			case 3: // somewhere else
				at = at&wrap | uint16(in.u8())%size
				continue
			case 4, 10:
				max := int(in.u8()%16) + 1
				var b vring.Batch
				n, err := d.Pop(&b, max)
				if broken != nil {
					popFailed(t, n, err, broken)
					break
				}
				type wanted struct {
					list      []piece
					id, count uint16
				}
				var want []wanted
				var wantErr error
				spans, pos := 0, s.Avail
				for len(want) < max && spans < int(size) {
					free := size - flying
					if free == 0 && len(want) > 0 {
						break // looked at with the next Pop
					}
					var w wanted
					if w.list, w.id, w.count, wantErr = im.packedList(fr.DescOff, size, pos, free, cfg&2 != 0, taken); wantErr != nil || w.count == 0 {
						break
					}
					want = append(want, w)
					taken[w.id] = true
					flying += w.count
					spans += len(w.list)
					for k := uint16(0); k < w.count; k++ {
						if pos++; pos&^wrap == size {
							pos = pos&wrap ^ wrap
						}
					}
				}
				if n != len(want) || n != len(b.Chains) || (err != nil) != (wantErr != nil) {
					t.Fatalf("Pop(%d) = %d, %v, want %d, %v", max, n, err, len(want), wantErr)
				}
				for i, c := range b.Chains {
					if c.ID != want[i].id || c.Count != want[i].count || !same(c, b.Spans, want[i].list) {
						t.Fatalf("chain %d: %+v of %+v, want %+v", i, c, b.Spans, want[i])
					}
					held = append(held, c)
				}
				if err != nil {
					popFailed(t, n, err, nil)
				} else if got := d.State().Avail; got != pos {
					t.Fatalf("position %#x, want %#x", got, pos)
				}
				broken = err
			case 5:
				k := int(in.u8()) % (len(held) + 1)
				var used []vring.Used
				for _, c := range held[:k] {
					used = append(used, vring.Used{ID: c.ID, Count: c.Count, Len: c.WriteLen})
				}
				if cfg&64 == 0 && k > 1 && in.u8()&1 != 0 {
					used[0], used[k-1] = used[k-1], used[0]
				}
				err := d.Complete(used)
				if broken != nil {
					if err != broken {
						t.Fatal(err)
					}
					break
				} else if err != nil {
					t.Fatal(err)
				}
				for _, c := range held[:k] {
					delete(taken, c.ID)
				}
				held = held[k:]
				// What stands there now: used descriptors, each where the one before ends.
				pos := s.Used
				for i, u := range used {
					b := fr.mem[fr.DescOff+16*uint64(pos&^wrap):]
					id, flags := binary.LittleEndian.Uint16(b[12:]), binary.LittleEndian.Uint16(b[14:])
					lap := pos&wrap != 0
					if cfg&64 != 0 { // one for all: all of them are filled
						u = used[k-1]
					}
					if id != u.ID || binary.LittleEndian.Uint32(b[8:]) != u.Len || (flags&pAvail != 0) != lap || (flags&pUsed != 0) != lap || (flags&2 != 0) != (u.Len != 0) {
						t.Fatalf("used descriptor %d at %#x: % x, want %+v", i, pos, b[:16], u)
					}
					if cfg&64 != 0 {
						break
					}
					for n := uint16(0); n < u.Count; n++ {
						if pos++; pos&^wrap == size {
							pos = pos&wrap ^ wrap
						}
					}
				}
			case 6:
				k := int(in.u8()) % (len(held) + 1)
				d.Unpop(k)
				if broken == nil {
					for _, c := range held[len(held)-k:] {
						delete(taken, c.ID)
					}
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
				b := im.b[fr.DescOff+16*uint64(s.Avail&^wrap):]
				flags := binary.LittleEndian.Uint16(b[14:])
				lap := s.Avail&wrap != 0
				there := (flags&pAvail != 0) == lap && (flags&pUsed != 0) != lap
				if there && flying == size {
					if !errors.Is(err, vring.ErrRestamp) {
						t.Fatal(pending, err)
					}
				} else if pending != there || err != nil {
					t.Fatal(pending, err)
				}
				broken = err
			case 8, 9:
				deviceOp(t, d, op, broken)
			case 12:
				fr.someDesc(in, fr.Payload+uint64(in.u8()%64)*16) // of an indirect table
				continue
			case 11:
				// A byte anywhere but in the device's own area.
				if off := uint64(in.u16()) % uint64(len(fr.mem)); off < fr.DeviceOff || off >= fr.DeviceOff+4 {
					fr.mem[off] = in.u8()
				}
				continue
			}
			// It wrote to the ring and its own area only.
			ring := 16 * uint64(size)
			if !bytes.Equal(im.b[:fr.DescOff], fr.mem[:fr.DescOff]) || !bytes.Equal(im.b[fr.DescOff+ring:fr.DeviceOff], fr.mem[fr.DescOff+ring:fr.DeviceOff]) ||
				!bytes.Equal(im.b[fr.DeviceOff+4:], fr.mem[fr.DeviceOff+4:]) {
				t.Fatal("the device side wrote outside its areas")
			}
			flying = 0
			for _, c := range held {
				flying += c.Count
			}
			if v := d.State(); vringtest.Packed.Between(size, v.Used, v.Avail) != int(flying) {
				t.Fatalf("state %+v with %d held", v, flying)
			}
			if d.Broken() != broken {
				t.Fatalf("Broken() = %v, want %v", d.Broken(), broken)
			}
		}
	})
}

// FuzzPackedDriver: a device side that writes anything anywhere.
func FuzzPackedDriver(f *testing.F) {
	addPackedSeeds(f)
	f.Add([]byte{3, 0, 0, 2, 1, 2, 0, 0, 1, 1, 3, 2, 1, 2, 0, 5, 5, 4, 9})
	f.Fuzz(func(t *testing.T, data []byte) {
		in := &reader{data}
		fsize, cfg := in.u8(), in.u8()
		fr := newPackedFuzzRig(t, fsize, cfg)
		fr.DrvCfg.Device.Region.Across = cfg&32 != 0
		size := fr.Size
		if cfg&16 != 0 {
			fr.DrvCfg.State = vringtest.Packed.Start(size, in.u16())
		}
		d, err := vring.NewPackedDriver(fr.DrvCfg)
		if err != nil {
			t.Fatal(err)
		}
		flying := map[uint16]flight{} // by buffer id
		var order []uint16
		token, free := uint32(0), int(size)
		pos := d.State().Used // where the next used descriptor ought to be
		run, runLen := 0, uint32(0)
		var broken error
		advance := func(at, n uint16) uint16 {
			for ; n > 0; n-- {
				if at++; at&^wrap == size {
					at = at&wrap ^ wrap
				}
			}
			return at
		}
		used := func(at uint16) (id uint16, n uint32, ok bool) {
			b := fr.mem[fr.DescOff+16*uint64(at&^wrap):]
			flags := binary.LittleEndian.Uint16(b[14:])
			lap := at&wrap != 0
			n = binary.LittleEndian.Uint32(b[8:])
			if flags&2 == 0 {
				n = 0
			}
			return binary.LittleEndian.Uint16(b[12:]), n, (flags&pAvail != 0) == lap && (flags&pUsed != 0) == lap
		}
		for ops := 0; in.more() && ops < 300; ops++ {
			switch op := in.u8() % 10; op {
			case 0, 1:
				q, fl := fr.someRequest(in, token)
				at := d.State().Avail
				got, err := d.Add([]vring.Request{q})
				switch {
				case fr.refused(t, q, got, err, broken):
				case fl.descs > free:
					if got != 0 || err != nil {
						t.Fatal(got, err)
					}
				default:
					if got != 1 || err != nil {
						t.Fatal(got, err)
					}
					last := advance(at, uint16(fl.descs)-1)
					id := binary.LittleEndian.Uint16(fr.mem[fr.DescOff+16*uint64(last&^wrap)+12:])
					if _, dup := flying[id]; dup || id >= size {
						t.Fatalf("id %d is in flight", id)
					}
					flying[id] = fl
					order = append(order, id)
					token++
					free -= fl.descs
				}
			case 2, 3:
				// A used descriptor: of a chain in flight, or not, where it ought to be.
				id, n := uint16(in.u8()), uint32(in.u8())
				if op == 2 && len(order) > 0 {
					id = order[int(id)%len(order)]
				}
				if fl, ok := flying[id]; ok && n > 200 {
					n = fl.writable
				}
				lap := pos&wrap != 0
				praw{fr.Rig}.used(pos&^wrap, lap, id, n)
			case 4, 5:
				done := make([]vring.Completion, int(in.u8()%8)+1)
				n, err := d.Reap(done)
				if broken != nil {
					if n != 0 || err != broken {
						t.Fatal(n, err)
					}
					break
				}
				want, wantErr := 0, false
				for want < len(done) && len(flying) > 0 {
					id := uint16(0)
					if run == 0 {
						var l uint32
						var ok bool
						if id, l, ok = used(pos); !ok {
							break
						}
						fl, in := flying[id]
						if !in || l > fl.writable {
							wantErr = true
							break
						}
						run, runLen = 1, l
						if cfg&64 != 0 {
							for order[run-1] != id {
								run++
							}
						}
					}
					if cfg&64 != 0 {
						id = order[0]
						order = order[1:]
					}
					fl := flying[id]
					l := fl.writable
					if run--; run == 0 {
						l = runLen
					}
					if want < n && done[want] != (vring.Completion{Token: fl.token, Len: l}) {
						t.Fatalf("completion %+v, want %+v, length %d", done[want], fl, l)
					}
					delete(flying, id)
					if cfg&64 == 0 {
						for i := range order {
							if order[i] == id {
								order = append(order[:i], order[i+1:]...)
								break
							}
						}
					}
					free += fl.descs
					pos = advance(pos, uint16(fl.descs))
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
				if err != nil {
					t.Fatal(err)
				}
				if after < 2 && run == 0 {
					if _, _, ok := used(pos); pending != (ok && len(flying) > 0) {
						t.Fatal(pending, ok)
					}
				}
			case 7, 8:
				driverOp(t, d, op, broken)
			case 9:
				// A byte in the ring, the device area, or somewhere else: nothing of it is believed
				// but what a used descriptor may say.
				fr.mem[uint64(in.u16())%uint64(len(fr.mem))] = in.u8()
			}
			if d.Free() != free {
				t.Fatalf("%d free, want %d", d.Free(), free)
			}
			if broken == nil && d.State().Used != pos {
				t.Fatalf("state %+v, want used %#x", d.State(), pos)
			}
			if d.Broken() != broken {
				t.Fatalf("Broken() = %v, want %v", d.Broken(), broken)
			}
		}
	})
}
