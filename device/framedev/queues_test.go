package framedev_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/framedev"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/frames"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// bench is a device model with a control plane that the test plays, and a driver's two ends.
type bench struct {
	t        *testing.T
	dev      *framedev.Net
	receiver frames.Receiver
	sender   frames.Sender
	stop     *doorbell.Eventfd
	res      [2]device.Resources
	broken   chan error
}

const benchQueue = 16

func newBench(t *testing.T, packed bool, h frames.Handler) *bench {
	t.Helper()
	b := &bench{t: t, broken: make(chan error, 16)}
	b.dev = newDevice(t, framedev.Config{Handler: h})
	b.dev.Notify(func(e device.Event) { b.broken <- e.Broken })
	f := virtio.FeaturesOf(virtio.Version1, virtio.EventIdx)
	sizes := vring.SplitSizes
	if packed {
		f.Set(virtio.RingPacked)
		sizes = vring.PackedSizes
	}
	if err := b.dev.SetFeatures(f, device.Options{}); err != nil {
		t.Fatal(err)
	}
	bell := func() *doorbell.Eventfd {
		e, err := doorbell.NewEventfd()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { e.Close() })
		return e
	}
	b.stop = bell()
	region := &dma.Region{Name: "test", Addr: 1 << 20, Mem: mmio.FromBytes(make([]byte, 1<<17)), Access: dma.DeviceRead | dma.DeviceWrite}
	tab, err := dma.NewTable(*region)
	if err != nil {
		t.Fatal(err)
	}
	table := new(dma.TableRef)
	table.Store(tab)
	off := uint64(0)
	take := func(n uint64) dma.Span {
		s := dma.Span{Region: region, Off: off, Len: uint32(n)}
		off += (n + 63) &^ 63
		return s
	}
	for i := range b.res {
		desc, driver, dev := sizes(benchQueue)
		c := vring.Config{Name: fmt.Sprint("queue ", i), Size: benchQueue, EventIdx: true, Desc: take(desc), Driver: take(driver), Device: take(dev)}
		areas, err := device.Translate(tab, b.dev.Queue(i), c.Size, packed, c.Desc.Addr(), c.Driver.Addr(), c.Device.Addr())
		if err != nil {
			t.Fatal(err)
		}
		kick, call := bell(), bell()
		b.res[i] = device.Resources{Size: c.Size, Areas: areas, Table: table, Kick: kick, Call: call}
		var q vring.Driver
		if packed {
			q, err = vring.NewPackedDriver(c)
		} else {
			q, err = vring.NewSplitDriver(c)
		}
		if err != nil {
			t.Fatal(err)
		}
		fc := frames.Config{Name: c.Name, MaxFrame: 1522, Ring: kick, Sleep: doorbell.SleeperConfig{Doorbell: call, Stop: b.stop}}
		mem := take(frames.MemSize(fc.MaxFrame, benchQueue))
		if i == virtio.NetQueueRX(0) {
			b.receiver, err = frames.NewDriverReceiver(fc, q, mem)
		} else {
			b.sender, err = frames.NewDriverSender(fc, q, mem)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) start() {
	b.t.Helper()
	for i := range b.res {
		b.must(b.dev.StartQueue(i, b.res[i], vring.State{}))
		b.must(b.dev.EnableQueue(i, true, time.Time{}))
	}
	b.must(b.dev.SetRunning(true, time.Time{}))
}

// numbers sends frames 0, 1, ... without end, going on where it was when it is called anew.
type numbers struct{ next uint64 }

func (n *numbers) send(ctx context.Context, s frames.Sender) error {
	for ctx.Err() == nil {
		out, err := s.Reserve(5)
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
			out[i].Len = copy(out[i].Room, frame(n.next+uint64(i)))
		}
		if err := s.Send(len(out)); err != nil {
			return err
		}
		n.next += uint64(len(out))
	}
	return nil
}

// expect takes frames and checks that none is missing.
type expect struct{ next uint64 } // atomic

func (x *expect) receive(ctx context.Context, r frames.Receiver) error {
	for ctx.Err() == nil {
		in, err := r.Receive(7)
		if err != nil {
			return err
		}
		for _, f := range in {
			if want := frame(x.next); !bytes.Equal(f, want) {
				return fmt.Errorf("frame %d: %x, want %x", x.next, f, want)
			}
			atomic.AddUint64(&x.next, 1)
		}
		if len(in) > 0 {
			continue
		}
		if why, err := r.Wait(); err != nil || why&doorbell.Stopped != 0 {
			return err
		}
	}
	return nil
}

// Queues that are stopped, changed and started again at random under traffic lose no frame, and the device's state goes out and in.
func TestQueues(t *testing.T) {
	for _, packed := range []bool{false, true} {
		packed := packed
		t.Run(fmt.Sprint("packed=", packed), func(t *testing.T) {
			t.Parallel()
			var down, up numbers
			var atDriver, atDevice expect
			b := newBench(t, packed, func(ctx context.Context, p frames.Port) error {
				return frames.Both(ctx, p, down.send, atDevice.receive)
			})
			b.start()
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 2)
			go func() { done <- up.send(ctx, b.sender) }()
			go func() { done <- atDriver.receive(ctx, b.receiver) }()
			seed := rand.Uint64()
			r := rand.New(rand.NewPCG(seed, 0))
			deadline := func() time.Time { return time.Now().Add(time.Minute) }
			for n := 0; n < 200; n++ {
				i := r.IntN(2)
				switch r.IntN(4) {
				case 0, 1:
					s, err := b.dev.StopQueue(i, deadline())
					b.must(err)
					b.must(s.Err)
					if _, err := b.dev.StopQueue(i, deadline()); !errors.Is(err, device.ErrStopped) {
						t.Fatalf("a second stop: %v", err)
					}
					if r.IntN(2) == 0 {
						time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
					}
					b.must(b.dev.StartQueue(i, b.res[i], s.State))
					if err := b.dev.StartQueue(i, b.res[i], s.State); !errors.Is(err, device.ErrStarted) {
						t.Fatalf("a second start: %v", err)
					}
				case 2:
					b.must(b.dev.ChangeQueue(i, device.Change{Areas: &b.res[i].Areas, Kick: b.res[i].Kick, Call: b.res[i].Call}, deadline()))
				case 3:
					b.must(b.dev.SetRunning(false, deadline()))
					b.must(b.dev.SetRunning(true, deadline()))
				}
				if n%20 == 0 { // traffic goes on
					a, d := atomic.LoadUint64(&atDriver.next), atomic.LoadUint64(&atDevice.next)
					until(t, nil, fmt.Sprint("traffic, seed ", seed), func() bool {
						return atomic.LoadUint64(&atDriver.next) > a+50 && atomic.LoadUint64(&atDevice.next) > d+50 || len(b.broken) > 0 || len(done) > 0
					})
				}
				if len(b.broken) > 0 || len(done) > 0 {
					break
				}
			}
			cancel()
			b.stop.Ring()
			for i := 0; i < 2; i++ {
				b.must(<-done)
			}
			until(t, nil, "the last frames", func() bool { return atomic.LoadUint64(&atDevice.next) == up.next || len(b.broken) > 0 })
			b.must(b.dev.Close())
			select {
			case err := <-b.broken:
				t.Fatalf("seed %d: %v", seed, err)
			default:
			}
			// What the device has sent is in the queue yet, to the last frame.
			for atDriver.next < down.next {
				in, err := b.receiver.Receive(64)
				b.must(err)
				if len(in) == 0 {
					t.Fatalf("seed %d: the device sent %d frames, %d came", seed, down.next, atDriver.next)
				}
				for _, f := range in {
					if !bytes.Equal(f, frame(atDriver.next)) {
						t.Fatalf("seed %d: frame %d: %x", seed, atDriver.next, f)
					}
					atDriver.next++
				}
			}
		})
	}
}

// While the transmit queue is disabled, frames are dropped and the program hears of none; an error of the program ends the queues
// until they are started again; a program that does not return is told of.
func TestDisabledAndBroken(t *testing.T) {
	t.Parallel()
	got := make(chan uint64, 64)
	mode := uint32(0) // atomic; 1: fail, 2: hang
	hang := make(chan struct{})
	b := newBench(t, false, func(ctx context.Context, p frames.Port) error {
		for {
			in, err := p.Receiver.Receive(1)
			if err != nil {
				return err
			}
			for _, f := range in {
				got <- binary.BigEndian.Uint64(f[14:])
				switch atomic.LoadUint32(&mode) {
				case 1:
					return errMade
				case 2:
					<-hang
				}
			}
			if len(in) > 0 {
				continue
			}
			if why, err := p.Receiver.Wait(); err != nil || why&doorbell.Stopped != 0 {
				return err
			}
		}
	})
	next := uint64(0)
	send := func(n int) {
		t.Helper()
		for ; n > 0; n-- {
			until(t, nil, "room", func() bool {
				out, err := b.sender.Reserve(1)
				b.must(err)
				if len(out) == 1 {
					out[0].Len = copy(out[0].Room, frame(next))
				}
				return len(out) == 1
			})
			b.must(b.sender.Send(1))
			next++
		}
	}
	b.start()
	tx := virtio.NetQueueTX(0)
	send(1)
	if n := <-got; n != 0 {
		t.Fatalf("frame %d", n)
	}
	b.must(b.dev.EnableQueue(tx, false, time.Time{}))
	send(3 * benchQueue) // more than the queue holds
	until(t, nil, "all frames are taken", func() bool { return b.dev.Status().Queues[tx].Pump["frames"] == 1+3*benchQueue })
	b.must(b.dev.EnableQueue(tx, true, time.Time{}))
	send(1)
	if n := <-got; n != 1+3*benchQueue {
		t.Fatalf("frame %d after those that were dropped", n)
	}

	atomic.StoreUint32(&mode, 1)
	send(1)
	<-got
	if err := <-b.broken; !errors.Is(err, errMade) {
		t.Fatalf("broken: %v", err)
	}
	atomic.StoreUint32(&mode, 2)
	var states [2]vring.State
	for i := range states {
		s, err := b.dev.StopQueue(i, time.Time{})
		b.must(err)
		if !errors.Is(s.Err, errMade) {
			t.Errorf("queue %d ended by %v", i, s.Err)
		}
		states[i] = s.State
	}
	for i := range states {
		b.must(b.dev.StartQueue(i, b.res[i], states[i]))
	}
	send(1)
	<-got
	if err := b.dev.Reset(time.Now().Add(time.Millisecond)); !errors.Is(err, device.ErrStuck) {
		t.Fatalf("reset: %v", err)
	}
	close(hang)
	b.must(b.dev.Close())
}
