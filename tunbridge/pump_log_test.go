package tunbridge

import (
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
)

// TestLoggedFrames: of buffers that a frame was read into, all pages are marked that changed, and no others; also those of a
// frame that is too long to be handed on.
func TestLoggedFrames(t *testing.T) {
	for _, vnet := range []bool{true, false} {
		ifaceNS(t)
		words := make([]uint32, 1<<20/32+1<<6) // for addresses up to 4 GiB and 8 MiB
		log, err := dma.NewLog(mmio.NewMem(unsafe.Pointer(&words[0]), uint64(4*len(words)), mmio.Cached), nil)
		if err != nil {
			t.Fatal(err)
		}
		limit := MaxFrame(1500, vnet)
		p := newPathOf(t, pathConfig{offload: vnet, size: 1514, mtu: 9000, queue: 256, rxBuffer: 1024, rxMem: 1 << 18, kind: mmio.Cached,
			max: [2]int{limit, longest}, log: vring.Log{Bits: log, Buffers: true}})
		if err := p.ifc[0].SetMTU(9000); err != nil {
			t.Fatal(err)
		}
		first := uint64(p.link) / dma.LogPage
		dropped := uint64(0)
		for i, size := range []int{64, 1514, 1518, 9014, 700, 4096, 64, 9014, 1514} {
			for k := range words {
				words[k] = 0
			}
			for k := range p.buffer {
				p.buffer[k] = 0xee
			}
			before := append([]byte(nil), p.buffer...)
			p.send(t, size, 0)
			wrote := 0
			for at := 0; at < len(before); at += dma.LogPage {
				page := first + uint64(at/dma.LogPage)
				marked := (*[4]byte)(unsafe.Pointer(&words[page/32]))[page%32/8]>>(page%8)&1 != 0
				changed := string(before[at:at+dma.LogPage]) != string(p.buffer[at:at+dma.LogPage])
				if changed {
					wrote++
				}
				if changed && !marked {
					t.Errorf("offload %v, frame %d of %d bytes: page %d was written and is not marked", vnet, i, size, at/dma.LogPage)
				}
				if marked && !changed && size+HeaderLen <= limit {
					t.Errorf("offload %v, frame %d of %d bytes: page %d is marked and was not written", vnet, i, size, at/dma.LogPage)
				}
			}
			if size+HeaderLen > limit {
				dropped++
			}
			if wrote == 0 || p.sent.count(cOversize) != dropped {
				t.Errorf("offload %v, frame %d of %d bytes: %d pages were written, %d frames dropped, want %d", vnet, i, size, wrote, p.sent.count(cOversize), dropped)
			}
		}
		if log.Outside() != 0 {
			t.Errorf("%d marks outside the log", log.Outside())
		}
	}
}
