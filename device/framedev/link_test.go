package framedev_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/framedev"
	"github.com/boardlink/boardlink/device/netdev"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/framedrv"
	"github.com/boardlink/boardlink/driver/netdrv"
	"github.com/boardlink/boardlink/frames"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/tunbridge"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const etherType = 0x88b5 // IEEE 802, local experimental

// frame makes frame number i: Ethernet header, number, filling, checksum.
func frame(i uint64) []byte {
	b := make([]byte, 60+int(i*61%1400))
	copy(b, "\x02\x00\x00\x00\x00\x02\x02\x00\x00\x00\x00\x01\x88\xb5")
	binary.BigEndian.PutUint64(b[14:], i)
	for j := range b[22 : len(b)-4] {
		b[22+j] = byte(j) ^ byte(i)
	}
	binary.BigEndian.PutUint32(b[len(b)-4:], crc32.ChecksumIEEE(b[:len(b)-4]))
	return b
}

// reflect returns each experimental frame to where it came from, the two addresses exchanged.
func reflect(_ context.Context, p frames.Port) error {
	for {
		in, err := p.Receiver.Receive(8)
		if err != nil {
			return err
		}
		for _, f := range in {
			if len(f) < 60 || binary.BigEndian.Uint16(f[12:]) != etherType {
				continue
			}
			var out []frames.Out
			for {
				if out, err = p.Sender.Reserve(1); err != nil {
					return err
				}
				if len(out) > 0 {
					break
				}
				if why, err := p.Sender.Wait(); err != nil || why&doorbell.Stopped != 0 {
					return err
				}
			}
			b := out[0].Room
			out[0].Len = copy(b, f[6:12])
			out[0].Len += copy(b[6:], f[:6])
			out[0].Len += copy(b[12:], f[12:])
			if err := p.Sender.Send(1); err != nil {
				return err
			}
		}
		if len(in) > 0 {
			continue
		}
		if why, err := p.Receiver.Wait(); err != nil || why&doorbell.Stopped != 0 {
			return err
		}
	}
}

// prober sends frames and checks what comes back, in order.
type prober struct {
	ups, answers uint64 // atomic
	failAt       uint64 // the first run fails after so many answers; 0: never
}

var errMade = errors.New("made by the test")

func (p *prober) handle(ctx context.Context, port frames.Port) error {
	up := atomic.AddUint64(&p.ups, 1)
	if port.MaxFrame != 1500+22 {
		return fmt.Errorf("MaxFrame is %d", port.MaxFrame)
	}
	return frames.Both(ctx, port, func(ctx context.Context, s frames.Sender) error {
		for i := uint64(0); ctx.Err() == nil; {
			out, err := s.Reserve(1 + int(i%7))
			if err != nil {
				return err
			}
			if len(out) == 0 {
				if why, err := s.Wait(); err != nil || why&doorbell.Stopped != 0 {
					return err
				}
				continue
			}
			for j := range out {
				out[j].Len = copy(out[j].Room, frame(i))
				i++
			}
			if err := s.Send(len(out)); err != nil {
				return err
			}
		}
		return nil
	}, func(_ context.Context, r frames.Receiver) error {
		for next := uint64(0); ; {
			in, err := r.Receive(16)
			if err != nil {
				return err
			}
			for _, f := range in {
				want := frame(next)
				for k := 0; k < 6; k++ {
					want[k], want[6+k] = want[6+k], want[k]
				}
				if !bytes.Equal(f, want) {
					return fmt.Errorf("answer %d: %x, want %x", next, f, want)
				}
				next++
				if n := atomic.AddUint64(&p.answers, 1); up == 1 && n == p.failAt {
					return errMade
				}
			}
			if len(in) > 0 {
				continue
			}
			if why, err := r.Wait(); err != nil || why&doorbell.Stopped != 0 {
				return err
			}
		}
	})
}

// until waits for a condition.
func until(t *testing.T, log fmt.Stringer, what string, ok func() bool) {
	t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 60*time.Second {
			t.Fatalf("%s: not within a minute; log:\n%s", what, log)
		}
	}
}

// link is a link over a test board with one device.
type link struct {
	t    *testing.T
	log  peer.Log
	spec string
}

const beat = 10 * time.Millisecond

func (l *link) run(side string, end interface{ Run(context.Context) error }) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- end.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			l.t.Errorf("%s: %v; log:\n%s", side, err, &l.log)
		}
	}
}

func (l *link) host(d device.Device) (stop func()) {
	return l.run("host", host.NewLink(host.Config{Name: "h", Board: l.spec, Devices: map[uint16]device.Device{0: d}, Log: &l.log, Beat: beat, LostBeats: 200}))
}

func (l *link) agent(d driver.Driver, placement string) (stop func()) {
	return l.run("agent", agent.NewLink(agent.Config{Name: "a", Board: l.spec, Placement: placement, Devices: []driver.Driver{d}, Log: &l.log, Beat: beat, LostBeats: 200}))
}

func newDevice(t *testing.T, c framedev.Config) *framedev.Net {
	t.Helper()
	d, err := framedev.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func newDriver(t *testing.T, c framedrv.Config) *framedrv.Net {
	t.Helper()
	d, err := framedrv.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// Two programs exchange frames over a board in each placement and with each kind of ring, through an error of a handler and
// restarts of both ends.
func TestPrograms(t *testing.T) {
	for _, c := range []struct {
		name, placement string
		packed          bool
		size            int
	}{{"window", "window", false, 0}, {"push", "push", false, 16}, {"packed", "window", true, 32}} {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := &link{t: t}
			_, l.spec = peer.NewBoard(t, testboard.PairOptions{})
			p := &prober{failAt: 100}
			dev := func() *framedev.Net {
				return newDevice(t, framedev.Config{Handler: reflect, BoardMAC: [6]byte{2, 0, 0, 0, 0, 1}})
			}
			drv := newDriver(t, framedrv.Config{Handler: p.handle, QueueSize: c.size, Packed: c.packed})
			answers := func() {
				t.Helper()
				from := atomic.LoadUint64(&p.answers)
				until(t, &l.log, "answers", func() bool { return atomic.LoadUint64(&p.answers) >= from+300 })
			}
			d := dev()
			stopHost, stopAgent := l.host(d), l.agent(drv, c.placement)
			answers()
			if ups := atomic.LoadUint64(&p.ups); ups != 2 {
				t.Errorf("%d ups after one error of the handler", ups)
			}
			s := drv.Status()
			if s.Counters["ups"] != 2 || s.Counters["broken"] != 1 || !s.Carrier || s.Pairs != 1 || len(s.Queues) != 2 || s.Queues[0].Pump["frames"] < 300 {
				t.Errorf("driver %+v", s)
			}
			if s := d.Status(); s.Counters["starts"] != 2 || s.Counters["broken"] != 0 || !s.Carrier || s.Queues[1].Pump["frames"] < 300 {
				t.Errorf("device %+v", s)
			}
			stopHost()
			if s := d.Status(); s.Carrier || s.Pairs != 0 {
				t.Errorf("device after its end %+v", s)
			}
			stopHost = l.host(dev())
			answers()
			stopAgent()
			drv = newDriver(t, framedrv.Config{Handler: p.handle, QueueSize: c.size, Packed: c.packed})
			stopAgent = l.agent(drv, c.placement)
			answers()
			stopAgent()
			stopHost()
			if !strings.Contains(l.log.String(), errMade.Error()) {
				t.Errorf("the log does not tell of the handler's error:\n%s", &l.log)
			}
		})
	}
}

// A program at one end, a tap interface at the other, either way round: what the kernel sends comes back.
func TestTap(t *testing.T) {
	netnstest.Need(t)
	for _, side := range []string{"host", "agent"} {
		side := side
		t.Run(side, func(t *testing.T) {
			t.Parallel()
			ns, err := netns.New()
			if err != nil {
				t.Fatal(err)
			}
			defer ns.Close()
			l := &link{t: t}
			_, l.spec = peer.NewBoard(t, testboard.PairOptions{})
			tap := tunbridge.Config{Name: "bl0", Type: tunbridge.TAP, Offload: true}
			var ifc *tunbridge.Iface
			var stopHost, stopAgent func()
			err = ns.Do(func() error {
				if side == "host" { // of the tap
					d, err := netdev.New(netdev.Config{Name: "net0", Interface: tap})
					if err != nil {
						return err
					}
					ifc = d.Interface()
					stopHost, stopAgent = l.host(d), l.agent(newDriver(t, framedrv.Config{Handler: reflect}), "auto")
				} else {
					d, err := netdrv.New(netdrv.Config{Name: "net0", Interface: tap})
					if err != nil {
						return err
					}
					ifc = d.Interface()
					stopHost, stopAgent = l.host(newDevice(t, framedev.Config{Handler: reflect})), l.agent(d, "auto")
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				stopAgent()
				stopHost()
				ifc.Close()
			}()
			var fd int
			proto := int(etherType>>8 | etherType&0xff<<8)
			if err := ns.Do(func() error {
				if err := ifc.SetUp(true); err != nil {
					return err
				}
				if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto); err != nil {
					return err
				}
				return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(proto), Ifindex: ifc.Index()})
			}); err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}); err != nil {
				t.Fatal(err)
			}
			var buf [2048]byte
			for i := uint64(0); i < 100; i++ {
				want, got := frame(i), frame(i)
				copy(got, want[6:12])
				copy(got[6:], want[:6])
				sent := false
				until(t, &l.log, fmt.Sprint("answer ", i), func() bool {
					if !sent || i == 0 { // the first ones may be sent before there is a carrier
						_, err := unix.Write(fd, want)
						sent = err == nil
					}
					n, err := unix.Read(fd, buf[:])
					if err != nil {
						return false
					}
					if i > 0 && binary.BigEndian.Uint64(buf[14:]) == 0 {
						return false // an answer to another try of the first
					}
					if !bytes.Equal(buf[:n], got) {
						t.Fatalf("answer %d: %x, want %x", i, buf[:n], got)
					}
					return true
				})
			}
		})
	}
}

// What is wrong in a configuration is named, with its bounds.
func TestConfig(t *testing.T) {
	t.Parallel()
	for want, c := range map[string]framedev.Config{
		"Handler":             {},
		"68 to 65521":         {Handler: reflect, MTU: 67},
		"power of two from 2": {Handler: reflect, QueueMax: 48},
		"1 to 1024":           {Handler: reflect, Batch: 1025},
	} {
		if _, err := framedev.New(c); !errors.Is(err, framedev.ErrConfig) || !strings.Contains(err.Error(), want) {
			t.Errorf("framedev %q: %v", want, err)
		}
		if _, err := framedrv.New(framedrv.Config{Handler: c.Handler, MTU: c.MTU, QueueSize: c.QueueMax, Batch: c.Batch}); !errors.Is(err, framedrv.ErrConfig) || !strings.Contains(err.Error(), want) {
			t.Errorf("framedrv %q: %v", want, err)
		}
	}
}
