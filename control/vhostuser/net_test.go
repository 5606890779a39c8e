package vhostuser

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/device/netdev"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// newNet makes a network device with a tap in a namespace of its own, where the kernel answers ARP
// requests for 10.66.0.1.
func newNet(t *testing.T) *netdev.Net {
	t.Helper()
	netnstest.Need(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	var n *netdev.Net
	err = ns.Do(func() (err error) {
		if n, err = netdev.New(netdev.Config{Name: "net0", Interface: tunbridge.Config{Name: "bl0"}}); err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		r, err := unix.NewIfreq("bl0")
		if err != nil {
			return err
		}
		if err := r.SetInet4Addr(net.IPv4(10, 66, 0, 1).To4()); err != nil {
			return err
		}
		return unix.IoctlIfreq(fd, unix.SIOCSIFADDR, r)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Interface().SetUp(true); err != nil {
		t.Fatal(err)
	}
	return n
}

// arps asks the kernel for its address count times, and checks each answer: request number k comes
// from an address of its own. between is called before each request. The carrier may have been off
// before the first request, and each one where k%10 is 8.
func (f *front) arps(count int, between func(k int)) {
	f.t.Helper()
	rx, tx := &f.qs[0], &f.qs[1]
	done := make([]vring.Completion, ringSize)
	mac := [6]byte{0x52, 0x54, 0, 0, 0, 9}
	post := func(n int) {
		k, err := rx.drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: dma.Addr(guestBase + buffer(0, n)), Len: bufLen}}, Token: uint32(n)}})
		if err != nil || k != 1 {
			f.t.Fatal(k, err)
		}
	}
	for rx.drv.Free() > ringSize/2 {
		post(ringSize - rx.drv.Free())
	}
	rx.drv.NeedKick()
	rx.kick.Ring()
	flapped := func(k int) bool { return k == 0 || k%10 == 8 }
	for k := 0; k < count; k++ {
		between(k)
		ip := [4]byte{10, 66, byte(k>>8) + 1, byte(k)}
		frame := make([]byte, tunbridge.HeaderLen, 60)
		frame = append(frame, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
		frame = append(frame, mac[:]...)
		frame = append(frame, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
		frame = append(frame, mac[:]...)
		frame = append(frame, ip[:]...)
		frame = append(frame, 0, 0, 0, 0, 0, 0, 10, 66, 0, 1)
		f.mem.CopyIn(buffer(1, k), frame)
		request := func() {
			if n, err := tx.drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: dma.Addr(guestBase + buffer(1, k)), Len: uint32(len(frame))}}, Readable: 1}}); n != 1 || err != nil {
				f.t.Fatal(n, err)
			}
			if tx.drv.NeedKick() {
				tx.kick.Ring()
			}
		}
		request()
		again := time.Now().Add(200 * time.Millisecond)
		for answered, end := false, time.Now().Add(limit); !answered; {
			switch now := time.Now(); {
			case now.After(end):
				f.t.Fatalf("no answer to request %d", k)
			case flapped(k) && now.After(again):
				// For a moment after the carrier comes on, the kernel drops what it sends.
				request()
				again = now.Add(200 * time.Millisecond)
			}
			if _, err := tx.drv.Reap(done); err != nil {
				f.t.Fatal(err)
			}
			n, err := rx.drv.Reap(done)
			if err != nil {
				f.t.Fatal(err)
			}
			for _, c := range done[:n] {
				b := make([]byte, c.Len)
				f.mem.CopyOut(b, buffer(0, int(c.Token)))
				post(int(c.Token))
				if b = b[tunbridge.HeaderLen:]; len(b) < 42 || binary.BigEndian.Uint16(b[12:]) != 0x0806 || b[21] != 2 {
					continue // the kernel has more to say
				}
				if last := k - 1; last >= 0 && flapped(last) && bytes.Equal(b[38:42], []byte{10, 66, byte(last>>8) + 1, byte(last)}) {
					continue // that request was made twice
				}
				if !bytes.Equal(b[:6], mac[:]) || !bytes.Equal(b[28:32], []byte{10, 66, 0, 1}) || !bytes.Equal(b[38:42], ip[:]) {
					f.t.Fatalf("answer to request %d: % x", k, b)
				}
				answered = true
			}
			if n > 0 && rx.drv.NeedKick() {
				rx.kick.Ring()
			}
			if n == 0 {
				time.Sleep(20 * time.Microsecond)
			}
		}
	}
}

// TestNetworkDevice: the kernel's answers come through a tap, its loops, and rings, while memory,
// doorbells and queues are changed under them.
func TestNetworkDevice(t *testing.T) {
	for _, k := range kinds[:3] {
		t.Run(k.name, func(t *testing.T) {
			n := newNet(t)
			defer n.Close()
			d := newDoor(t, n)
			defer d.stop()
			feat := k.f
			if feat.Has(virtio.RingPacked) {
				feat.Set(virtio.NetMrgRxbuf)
			}
			f := running(t, d, feat)
			layouts := [][]region{f.regs, {{guestBase, mib, userBase, 0}, {guestBase + mib, frontSize - mib, userBase + 1<<37, mib}}, {{guestBase, frontSize, userBase, 0}}}
			extra, file := region{1 << 40, mib, 1 << 45, 0}, memfd(t, mib)
			f.arps(200, func(i int) {
				switch i % 10 {
				case 2, 5:
					f.regs = layouts[i/3%len(layouts)]
					f.setTable()
				case 3:
					f.set(AddMemReg, slot(extra), file)
				case 4:
					f.set(RemMemReg, slot(extra))
				case 6:
					for q := 0; q < 2; q++ {
						f.bells(q)
						f.set(SetVringCall, encodeU64(uint64(q)), f.qs[q].call.FD())
						f.set(SetVringKick, encodeU64(uint64(q)), f.qs[q].kick.FD())
					}
				case 8:
					for q := 0; q < 2; q++ {
						f.start(q, f.stop(q))
					}
				}
			})
			c := d.n.load()
			if c["failed"] != 0 || c["queues_broken"] != 0 || c["connections"] != 1 || c["queue_starts"] != 42 || c["tables"] < 60 {
				t.Errorf("%v", c)
			}
			if s := d.Status(); len(s.Devices) != 1 || !s.Devices[0].Carrier || s.State != stateConnected {
				t.Errorf("%+v", s)
			}
			if m := mapsOf(t, f.file); m != 1+len(f.regs) {
				t.Errorf("%d mappings of the memory, want the front end's and %d", m, len(f.regs))
			}
			// A pair that is disabled takes what is sent, and hands out nothing.
			f.enable(0, 0)
			f.enable(1, 0)
			eventually(t, "the carrier is off", func() bool { return !d.Status().Devices[0].Carrier })
			f.enable(0, 1)
			f.enable(1, 1)
			f.arps(10, func(int) {})

			// The memory is truncated under the loops: this connection ends, and the next front end
			// finds the device as new.
			if err := unix.Ftruncate(f.file, 0); err != nil {
				t.Fatal(err)
			}
			f.qs[1].kick.Ring()
			eventually(t, "the memory is unmapped", func() bool { return mapsOf(t, f.file) == 1 })
			if got := d.n.load()["memory_faults"]; got == 0 {
				t.Error("no fault is counted")
			}
			running(t, d, feat).arps(10, func(int) {})
		})
	}
}
