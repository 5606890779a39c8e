package tunbridge

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

const longest = HeaderLen + MaxFrameLen

// send sends one frame of so many bytes, with VLAN tags, and carries it over.
func (p *path) send(t *testing.T, size, tags int) {
	t.Helper()
	f := make([]byte, size)
	copy(f, p.frame[:12])
	at := 12
	for ; tags > 0; tags-- {
		copy(f[at:], map[int][]byte{1: {0x81, 0, 0, 1}, 2: {0x88, 0xa8, 0, 2}}[tags])
		at += 4
	}
	copy(f[at:], []byte{0x88, 0xb5})
	for i := at + 2; i < size; i++ {
		f[i] = byte(i * 7)
	}
	if _, err := unix.Write(p.socket, f); err != nil {
		t.Fatalf("send %d bytes: %v", size, err)
	}
	if err := p.in(); err != nil {
		t.Fatalf("in: %v", err)
	}
	if err := p.out(); err != nil {
		t.Fatalf("out: %v", err)
	}
	p.device.(half).shared().flush()
	p.driver.(half).shared().flush()
}

// longAgo makes the last look at the interface's MTU one of long ago.
func (p *path) longAgo() {
	p.device.(half).shared().followed = time.Time{}
	p.driver.(half).shared().followed = time.Time{}
}

// forKinds calls f for each way in which a pump handles a frame's bytes.
func forKinds(t *testing.T, f func(t *testing.T, c pathConfig)) {
	for _, toHost := range []bool{true, false} {
		for _, vnet := range []bool{true, false} {
			for _, how := range []string{"cached", "uncached", "moved"} {
				name := fmt.Sprintf("toHost=%v/vnet=%v/%s", toHost, vnet, how)
				t.Run(name, func(t *testing.T) {
					ifaceNS(t)
					c := pathConfig{toHost: toHost, offload: vnet, size: 1514, mtu: 1500, queue: 256, rxBuffer: 2048, rxMem: 1 << 20}
					if how != "cached" {
						c.kind = mmio.Uncached
					}
					if how == "moved" {
						c.mover = dma.NewMover(dma.MoverConfig{Engine: dma.NewCPUEngine(64), Min: 1})
					}
					f(t, c)
				})
			}
		}
	}
}

// TestOverlongSent: a frame from the interface that is longer than was agreed is dropped and counted, whatever the way of its
// bytes; the longest one that was agreed passes, whole. Nothing is cut.
func TestOverlongSent(t *testing.T) {
	forKinds(t, func(t *testing.T, c pathConfig) {
		limit := MaxFrame(1500, false)
		c.max = [2]int{limit, longest}
		p := newPathOf(t, c)
		if err := p.ifc[0].SetMTU(9000); err != nil {
			t.Fatal(err)
		}
		type sent struct{ size, tags int }
		var frames, over, size uint64
		for _, s := range []sent{{1514, 0}, {1518, 1}, {1522, 2}, {limit - HeaderLen, 0}, {limit - HeaderLen + 1, 0}, {2048 - HeaderLen, 0},
			{2049 - HeaderLen, 0}, {4096, 0}, {9014, 0}, {9018, 1}, {64, 0}, {1514, 0}} {
			p.send(t, s.size, s.tags)
			if s.size > limit-HeaderLen {
				over++
			} else {
				frames++
				size += uint64(s.size)
			}
			if got := p.sent.count(cOversize); got != over {
				t.Fatalf("after a frame of %d bytes: %d dropped as too long, want %d", s.size, got, over)
			}
		}
		if n, b := p.moved.Frames(), p.moved.count(cBytes); n != frames || b != size {
			t.Errorf("%d frames of %d bytes came over, want %d of %d", n, b, frames, size)
		}
		if n := p.sent.Frames(); n != frames {
			t.Errorf("%d frames counted as sent, want %d", n, frames)
		}
		if n := p.moved.count(cOversize) + p.moved.count(cDropped) + p.sent.count(cDropped); n != 0 {
			t.Errorf("%d frames counted where none was lost", n)
		}
	})
}

// TestOverlongReceived: a frame that fits the buffers and is longer than this side's MTU allows is dropped and counted, and nothing
// else happens; when the MTU of the interface is raised such frames pass.
func TestOverlongReceived(t *testing.T) {
	forKinds(t, func(t *testing.T, c pathConfig) {
		c.mtu = 9000
		limit := MaxFrame(1500, false)
		c.max, c.follow = [2]int{longest, limit}, [2]int{0, longest}
		p := newPathOf(t, c)
		if err := p.ifc[1].SetMTU(1500); err != nil {
			t.Fatal(err)
		}
		for _, size := range []int{1514, limit - HeaderLen, limit - HeaderLen + 1, 9014, 64} {
			p.send(t, size, 0)
		}
		p.send(t, 1522, 2)
		if n, over := p.moved.Frames(), p.moved.count(cOversize); n != 4 || over != 2 {
			t.Errorf("%d frames came over and %d were dropped as too long, want 4 and 2", n, over)
		}
		if c.mover != nil && c.toHost {
			return // does not follow
		}
		if err := p.ifc[1].SetMTU(9000); err != nil {
			t.Fatal(err)
		}
		p.longAgo()
		p.send(t, 9014, 0)
		p.send(t, 9014, 0)
		if n, over := p.moved.Frames(), p.moved.count(cOversize); n != 6 || over != 2 {
			t.Errorf("with an MTU of 9000: %d frames came over and %d were dropped as too long, want 6 and 2", n, over)
		}
	})
}

// TestSenderFollows: where no MTU was agreed, a sender follows that of its interface.
func TestSenderFollows(t *testing.T) {
	forKinds(t, func(t *testing.T, c pathConfig) {
		c.max, c.follow = [2]int{MaxFrame(1500, false), longest}, [2]int{MaxFrame(4000, false), 0}
		p := newPathOf(t, c)
		if err := p.ifc[0].SetMTU(4000); err != nil {
			t.Fatal(err)
		}
		p.send(t, 4014, 0) // lost, and noticed
		want := uint64(1)
		if c.mover != nil && !c.toHost {
			want = 0 // does not follow
		}
		p.send(t, 4014, 0)
		if n, over := p.moved.Frames(), p.sent.count(cOversize); n != want || over != 2-want {
			t.Errorf("%d frames came over and %d were dropped as too long, want %d and %d", n, over, want, 2-want)
		}
		if err := p.ifc[0].SetMTU(9000); err != nil {
			t.Fatal(err)
		}
		p.longAgo()
		over := p.sent.count(cOversize)
		p.send(t, 9014, 0)
		p.send(t, 9014, 0)
		if got := p.sent.count(cOversize) - over; got != 2 {
			t.Errorf("beyond MaxFollow: %d frames dropped as too long, want 2", got)
		}
	})
}

// TestLongestFrames: what the largest MTU allows, with a VLAN tag, goes over whole.
func TestLongestFrames(t *testing.T) {
	for _, toHost := range []bool{true, false} {
		ifaceNS(t)
		p := newPathOf(t, pathConfig{toHost: toHost, offload: true, size: 64, mtu: 65521, max: [2]int{longest, longest}, queue: 256, rxBuffer: 16 << 10, rxMem: 1 << 20})
		p.send(t, 65521+14, 0)
		p.send(t, 65521+14+4, 1)
		if n, b := p.moved.Frames(), p.moved.count(cBytes); n != 2 || b != 2*(65521+14)+4 {
			t.Errorf("toHost %v: %d frames of %d bytes came over, %d too long", toHost, n, b, p.sent.count(cOversize))
		}
	}
}

// TestManyPieces: chains and merged frames of more pieces than the kernel takes iovecs go by way of local memory, whole.
func TestManyPieces(t *testing.T) {
	t.Run("transmit chain", func(t *testing.T) {
		for _, kind := range []mmio.Kind{mmio.Cached, mmio.Uncached} {
			ifaceNS(t)
			p := newPathOf(t, pathConfig{toHost: true, offload: true, size: 1514, mtu: 1500, kind: kind, max: [2]int{longest, longest}, queue: 4096, rxMem: 1 << 20, noPumps: true})
			frame := append(make([]byte, HeaderLen), p.frame...)
			copy(p.buffer, frame)
			calls := uint64(0)
			for i, pieces := range []int{1, 2, 255, 1022, 1023, 1024, 1025, len(frame)} {
				var bufs []vring.Buffer
				for off := 0; off < len(frame); {
					n := 1
					if len(bufs) == pieces-1 {
						n = len(frame) - off
					}
					bufs = append(bufs, vring.Buffer{Addr: p.link + dma.Addr(off), Len: uint32(n)})
					off += n
				}
				if n, err := p.drv.Add([]vring.Request{{Bufs: bufs, Readable: len(bufs)}}); n != 1 || err != nil {
					t.Fatalf("%d pieces: %v", pieces, err)
				}
				if err := p.out(); err != nil {
					t.Fatalf("%d pieces: %v", pieces, err)
				}
				if n, dropped := p.moved.Frames(), p.moved.count(cDropped); n != uint64(i+1) || dropped != 0 {
					t.Fatalf("%v, %d pieces: %d frames were written and %d dropped, want %d and none", kind, pieces, n, dropped, i+1)
				}
				calls++
				if got := p.moved.count(cSyscalls); got != calls {
					t.Errorf("%d pieces: %d system calls for %d frames", pieces, got, calls)
				}
				var done [1]vring.Completion
				if n, err := p.drv.Reap(done[:]); n != 1 || err != nil {
					t.Fatalf("%d pieces: %d came back: %v", pieces, n, err)
				}
			}
		}
	})
	// Receive buffers of 32 bytes: a frame of 40000 bytes takes 1251 of them, on both sides.
	t.Run("mergeable buffers", func(t *testing.T) {
		for _, kind := range []mmio.Kind{mmio.Cached, mmio.Uncached} {
			for _, vnet := range []bool{true, false} {
				ifaceNS(t)
				p := newPathOf(t, pathConfig{offload: vnet, size: 64, kind: kind, mtu: 65000, max: [2]int{longest, longest}, queue: 4096, rxBuffer: 32, rxMem: 4096 * 32})
				out := p.out
				p.out = func() (err error) { // a batch is a number of buffers
					for i := 0; i < 1300/batchFrames && err == nil; i++ {
						err = out()
					}
					return err
				}
				p.send(t, 40000, 0)
				p.send(t, 64, 0)
				if n, b := p.moved.Frames(), p.moved.count(cBytes); n != 2 || b != 40064 {
					t.Errorf("%v, vnet %v: %d frames of %d bytes came over, want 2 of 40064: %d and %d dropped", kind, vnet, n, b, p.sent.count(cDropped), p.moved.count(cDropped))
				}
			}
		}
	})
	// One chain of 2000 pieces, behind a header of its own.
	t.Run("receive chain", func(t *testing.T) {
		ifaceNS(t)
		p := newPathOf(t, pathConfig{offload: true, size: 1514, mtu: 1500, max: [2]int{MaxFrame(1500, false), longest}, queue: 4096, rxMem: 1 << 20, noPumps: true})
		bufs := []vring.Buffer{{Addr: p.link, Len: 16}}
		for i := 0; i < 2000; i++ {
			bufs = append(bufs, vring.Buffer{Addr: p.link + dma.Addr(16+i), Len: 1})
		}
		if n, err := p.drv.Add([]vring.Request{{Bufs: bufs}}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if _, err := unix.Write(p.socket, p.frame); err != nil {
			t.Fatal(err)
		}
		if err := p.in(); err != nil {
			t.Fatal(err)
		}
		var done [1]vring.Completion
		if n, err := p.drv.Reap(done[:]); n != 1 || err != nil || done[0].Len != HeaderLen+1514 {
			t.Fatalf("%d came back, of %d bytes: %v", n, done[0].Len, err)
		}
		if !bytes.Equal(p.buffer[HeaderLen:HeaderLen+1514], p.frame) || p.sent.count(cDropped) != 0 {
			t.Errorf("the frame is another one, or counted as dropped: %d", p.sent.count(cDropped))
		}
	})
}

// TestLittleRoom: a driver with less memory in mergeable buffers than the longest frame takes gets what fits; what does not is
// dropped and counted. With more memory all fits again.
func TestLittleRoom(t *testing.T) {
	for _, kind := range []mmio.Kind{mmio.Cached, mmio.Uncached} {
		ifaceNS(t)
		p := newPathOf(t, pathConfig{offload: true, size: 1514, kind: kind, mtu: 65000, max: [2]int{longest, longest}, queue: 8, rxMem: 1 << 20, noPumps: true})
		rx := p.device.(*DeviceRX)
		give := func(n int) {
			t.Helper()
			for i := 0; i < n; i++ {
				if k, err := p.drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: p.link, Len: 16 << 10}}}}); k != 1 || err != nil {
					t.Fatal(k, err)
				}
			}
		}
		reaped := func() (n int) {
			t.Helper()
			var done [8]vring.Completion
			n, err := p.drv.Reap(done[:])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		send := func(size int) {
			t.Helper()
			if _, err := unix.Write(p.socket, append(p.frame[:14:14], make([]byte, size-14)...)); err != nil {
				t.Fatal(err)
			}
		}
		step := func() {
			t.Helper()
			if _, err := rx.step(turn{read: true}); err != nil {
				t.Fatal(err)
			}
		}
		give(4) // 64 KiB: 33 bytes too few
		send(1514)
		step()
		if !rx.starved || reaped() != 0 {
			t.Fatalf("starved %v: a driver that is slow is waited for", rx.starved)
		}
		pending := func() bool {
			t.Helper()
			ok, err := rx.arm()
			if err != nil {
				t.Fatal(err)
			}
			return ok.pending
		}
		if pending() {
			t.Error("not waited for at all")
		}
		rx.disarm()
		time.Sleep(shortAfter + 10*time.Millisecond)
		if !pending() {
			t.Fatal("still waiting for more than the driver has")
		}
		rx.disarm()
		step()
		if n := reaped(); n != 1 || p.sent.Frames() != 1 {
			t.Fatalf("%d buffers came back, %d frames", n, p.sent.Frames())
		}
		give(1)
		send(65014)
		send(65014)
		send(1514)
		step()
		for i := 0; i < 4; i++ {
			if n := reaped(); n > 0 {
				give(n)
			}
			step()
		}
		if n, over := p.sent.Frames(), p.sent.count(cOversize); n != 4 || over != 0 {
			t.Errorf("%d frames went, %d too long; want 4, none: 64 KiB take 65026 bytes", n, over)
		}
		p.sent.flush(&rx.d)
		// 32 KiB are all there is: a long frame is dropped, the next one goes.
		ifaceNS(t)
		q := newPathOf(t, pathConfig{offload: true, size: 1514, kind: kind, mtu: 65000, max: [2]int{longest, longest}, queue: 8, rxMem: 1 << 20, noPumps: true})
		p, rx = q, q.device.(*DeviceRX)
		give(2)
		send(40000)
		send(1514)
		step()
		pending()
		rx.disarm()
		time.Sleep(shortAfter + 10*time.Millisecond)
		if !pending() {
			t.Fatal("still waiting for more than the driver has")
		}
		rx.disarm()
		step()
		p.sent.flush(&rx.d)
		if n, over := p.sent.Frames(), p.sent.count(cOversize); n != 1 || over != 1 {
			t.Errorf("%d frames went, %d too long; want 1 and 1", n, over)
		}
		// More memory comes: the long ones wait for room again.
		give(reaped() + 4)
		send(40000)
		step()
		p.sent.flush(&rx.d)
		if n, over := p.sent.Frames(), p.sent.count(cOversize); n != 2 || over != 1 || rx.need != longest {
			t.Errorf("%d frames went, %d too long; want 2 and 1; need %d", n, over, rx.need)
		}
		// A driver that was slow, not short: the buffer that is there is no reason to leave the others.
		ifaceNS(t)
		q = newPathOf(t, pathConfig{offload: true, size: 1514, kind: kind, mtu: 65000, max: [2]int{longest, longest}, queue: 8, rxMem: 1 << 20, noPumps: true})
		p, rx = q, q.device.(*DeviceRX)
		give(1)
		step()
		pending()
		rx.disarm()
		time.Sleep(shortAfter + 10*time.Millisecond)
		if !pending() {
			t.Fatal("still waiting for more than the driver has")
		}
		rx.disarm()
		if ok, err := rx.gather(); !ok || err != nil || rx.need != 16<<10 {
			t.Fatalf("room for %d bytes counts as enough: %v, %v", rx.need, ok, err)
		}
		give(5)
		send(65014)
		step()
		p.sent.flush(&rx.d)
		if n, over := p.sent.Frames(), p.sent.count(cOversize); n != 1 || over != 0 || rx.need != longest {
			t.Errorf("%d frames went, %d too long; want 1 and none; need %d", n, over, rx.need)
		}
	}
}

// TestReadErrors: what the kernel says of the buffers of a read is no lost frame, and memory that is gone is not the interface's fault.
func TestReadErrors(t *testing.T) {
	ifaceNS(t)
	p := newPathOf(t, pathConfig{offload: true, size: 1514, mtu: 1500, max: [2]int{MaxFrame(1500, false), longest}, queue: 8, rxMem: 16 << 10, noPumps: true})
	var b [8]byte
	iov := make([]unix.Iovec, maxIOV+1)
	for i := range iov {
		iov[i].Base = &b[0]
		iov[i].SetLen(1)
	}
	if _, err := unix.Write(p.socket, p.frame); err != nil {
		t.Fatal(err)
	}
	for _, v := range [][]unix.Iovec{iov, nil, iov[:8]} {
		if _, err := p.ifc[0].ReadV(v); err != ErrBuffers || IsDrop(err) || errors.Is(err, ErrDropped) {
			t.Errorf("a read with %d iovecs: %v", len(v), err)
		}
	}
	if _, err := p.ifc[0].WriteV(iov); err != ErrMalformed || !IsDrop(err) {
		t.Errorf("a write with %d iovecs: %v", len(iov), err)
	}
}

// TestMemoryGone: the kernel finds the memory of a frame gone. That is the fault of the memory's owner, and ends the pump.
func TestMemoryGone(t *testing.T) {
	ifaceNS(t)
	p := newPathOf(t, pathConfig{toHost: true, offload: true, size: 1514, mtu: 1500, max: [2]int{longest, longest}, queue: 8, rxMem: 16 << 10, noPumps: true})
	bufs := []vring.Buffer{{Addr: p.link, Len: HeaderLen}, {Addr: p.link + 4096, Len: 1514}}
	if n, err := p.drv.Add([]vring.Request{{Bufs: bufs, Readable: 2}}); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if err := unix.Mprotect(p.buffer[4096:], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	err := p.out()
	var m *MemoryError
	if !errors.As(err, &m) || !errors.Is(err, ErrFault) || m.Queue != "test" || strings.Contains(err.Error(), p.ifc[1].Name()) {
		t.Errorf("write from memory that is gone: %v", err)
	}
	if err := unix.Mprotect(p.buffer[4096:], unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	p.device.(half).shared().flush()
	if n, dropped := p.moved.Frames(), p.moved.count(cDropped); n != 0 || dropped != 0 {
		t.Errorf("%d frames, %d refused by the interface; it is not its fault", n, dropped)
	}
}

// TestRefusedByKernel: a header that the kernel refuses costs this one frame, which counts as dropped and not as moved.
func TestRefusedByKernel(t *testing.T) {
	ifaceNS(t)
	p := newPathOf(t, pathConfig{toHost: true, offload: true, size: 64, mtu: 1500, max: [2]int{longest, longest}, queue: 8, rxMem: 16 << 10, noPumps: true})
	frame := append(make([]byte, HeaderLen), p.frame...)
	bad := append([]byte(nil), frame...)
	bad[HdrOffFlags] = HdrFlagNeedsCsum
	binary.LittleEndian.PutUint16(bad[HdrOffCSUMStart:], 60000)
	bad[HdrOffGSOType] = 77
	for i, f := range [][]byte{bad, frame, bad, frame} {
		copy(p.buffer, f)
		if n, err := p.drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: p.link, Len: uint32(len(f))}}, Readable: 1}}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if err := p.out(); err != nil {
			t.Fatalf("frame %d: %v", i, err)
		}
	}
	if n, dropped, b, gso := p.moved.Frames(), p.moved.count(cDropped), p.moved.count(cBytes), p.moved.count(cGSO); n != 2 || dropped != 2 || b != 2*64 || gso != 0 {
		t.Errorf("%d frames of %d bytes, %d super-packets, %d dropped; want 2 of 128, none, 2 dropped", n, b, gso, dropped)
	}
}
