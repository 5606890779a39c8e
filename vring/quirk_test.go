package vring_test

import (
	"testing"

	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// TestInOrderWritten: in order, each chain that was written has a used element of its own, also where it was written to its end: DPDK's
// driver reads the length of each. Chains that were only read share one.
func TestInOrderWritten(t *testing.T) {
	for _, ring := range rings {
		for _, m := range vringtest.Memories {
			r := raw{vringtest.NewRig(t, vringtest.Params{Ring: ring, Memory: m, EventIdx: true, InOrder: true}, 8, 65536)}
			drv, dev := r.Pair(t)
			var reqs []vring.Request
			for i := uint32(0); i < 5; i++ {
				reqs = append(reqs, request(r, i, int(i/3), 100+i)) // 0, 1, 2 are written; 3, 4 are read
			}
			if n, err := drv.Add(reqs); n != 5 || err != nil {
				t.Fatal(n, err)
			}
			var b vring.Batch
			if n, err := dev.Pop(&b, 8); n != 5 || err != nil {
				t.Fatal(n, err)
			}
			var used []vring.Used
			for _, c := range b.Chains {
				used = append(used, vring.Used{ID: c.ID, Count: c.Count, Len: c.WriteLen})
			}
			if err := dev.Complete(used); err != nil {
				t.Fatal(err)
			}
			for i := uint16(0); i < 4; i++ {
				id, n := uint32(used[i].ID), used[i].Len
				if i == 3 {
					id = uint32(used[4].ID) // of the last one that it stands for
				}
				var gotID, gotLen uint32
				if ring.Name == vringtest.Packed.Name {
					d := praw(r).get(i)
					gotID, gotLen = uint32(d.id), d.n
					if d.flags&(pAvail|pUsed) != pAvail|pUsed {
						t.Errorf("%s: descriptor %d is not used: flags %#x", m.Name, i, d.flags)
					}
				} else {
					gotID, gotLen = r.getUsed(i)
				}
				if gotID != id || gotLen != n {
					t.Errorf("%s, %s: used element %d is chain %d of %d bytes, want %d of %d", ring.Name, m.Name, i, gotID, gotLen, id, n)
				}
			}
		}
	}
}

// TestSentTable: in a queue by which the driver only sends, what an indirect table of a packed ring marks as to be written is read.
func TestSentTable(t *testing.T) {
	for _, m := range vringtest.Memories {
		r := praw{vringtest.NewRig(t, packed(m, false, true), 4, 65536)}
		c := r.DevCfg
		c.Sent = true
		d, err := vring.NewPackedDevice(c)
		if err != nil {
			t.Fatal(err)
		}
		for i := uint64(0); i < 3; i++ {
			raw(r).descAt(r.Payload+4096+16*i, r.Addr(100*i), uint32(i)+1, 0, uint16([]int{write, 0, 0}[i])) // as DPDK 22.11 does
		}
		r.avail(0, true, r.Addr(4096), 48, 3, indirect)
		var b vring.Batch
		want := vring.Chain{ID: 3, Count: 1, Readable: 3, ReadLen: 6}
		if n, err := d.Pop(&b, 1); n != 1 || err != nil || b.Chains[0] != want {
			t.Fatalf("%s: %d, %v, %+v", m.Name, n, err, b.Chains)
		}
	}
}
