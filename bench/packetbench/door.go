//go:build linux

package packetbench

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/control/vhostuser"
	"github.com/boardlink/boardlink/device/framedev"
	"github.com/boardlink/boardlink/driver/framedrv"
	"github.com/boardlink/boardlink/frames"
	"github.com/boardlink/boardlink/virtio"
)

// Ends are those of a link that are ours in a comparison with DPDK's two.
type Ends string

// The ends. Those that are not ours are testpmd's, and the link to them is a vhost-user socket.
const (
	BothEnds  Ends = "both"
	DeviceEnd Ends = "device" // the host's side, where DPDK has net_vhost
	DriverEnd Ends = "driver" // the board's side, where DPDK has net_virtio_user
)

// mixedMTU is the MTU of a link between our end and testpmd's, in bytes; mixedMax the longest frame.
const (
	mixedMTU = 1500
	mixedMax = mixedMTU + 14
)

// CheckEnds returns what is wrong with c where only these ends are ours.
func (c Config) CheckEnds(e Ends) error {
	if e != BothEnds && c.Bytes > mixedMax {
		return fmt.Errorf("frames of %d bytes: at most %d between %s and our %s side", c.Bytes, mixedMax, testpmd, e)
	}
	return nil
}

// mixed is our end of a link to a testpmd: a door or a front end of package vhostuser, as a program has it, with a device whose
// frames go to and come from this program. Its loop has a processor of its own, and rests between measurements.
type mixed struct {
	ends   Ends
	cpu    int
	end    context.CancelFunc
	done   chan error // of the door or front end
	close  func() error
	orders chan *order
}

// order is one measurement. The loop sends or receives until stop is set, and counts.
type order struct {
	c        Config
	drain    bool // receive, and do nothing else
	stop     atomic.Bool
	counting atomic.Bool // what is received now was sent for this measurement
	moved    atomic.Uint64
	corrupt  uint64
	done     chan error
}

// noLog takes what the door tells; a failure is the error of a measurement.
type noLog struct{}

func (noLog) Debug(string, ...interface{}) {}
func (noLog) Info(string, ...interface{})  {}
func (noLog) Warn(string, ...interface{})  {}
func (noLog) Error(string, ...interface{}) {}

// startMixed makes our end of a link by the socket path: a device end listens, a driver end connects.
func startMixed(c Config, ends Ends, path string) (*mixed, error) {
	m := &mixed{ends: ends, cpu: c.CPU[0], done: make(chan error, 1), orders: make(chan *order)}
	var run func(context.Context) error
	spec := vhostuser.Spec{Path: path, FD: -1}
	if ends == DeviceEnd {
		m.cpu = c.CPU[1]
		dev, err := framedev.New(framedev.Config{Handler: m.handle, MTU: mixedMTU, QueueMax: c.Size, Batch: c.Batch})
		if err != nil {
			return nil, err
		}
		d := vhostuser.New(vhostuser.Config{Name: "bench", Spec: spec, Device: dev, Log: noLog{}})
		if err := d.Open(context.Background()); err != nil {
			return nil, err
		}
		run, m.close = d.Run, dev.Close
	} else {
		var deny virtio.Features
		if !c.InOrder {
			deny.Set(virtio.InOrder)
		}
		deny.Set(virtio.EventIdx) // as testpmd's own driver
		drv, err := framedrv.New(framedrv.Config{Handler: m.handle, MTU: mixedMTU, QueueSize: c.Size, Batch: c.Batch, Packed: c.Ring == "packed", Deny: deny})
		if err != nil {
			return nil, err
		}
		spec.Client = true
		f := vhostuser.NewFrontend(vhostuser.FrontendConfig{Name: "bench", Spec: spec, Driver: drv, MTU: func() int { return mixedMTU }, Log: noLog{}})
		run, m.close = f.Run, drv.Close
	}
	ctx, cancel := context.WithCancel(context.Background())
	m.end = cancel
	go func() { m.done <- run(ctx) }()
	return m, nil
}

// stop ends our end of the link.
func (m *mixed) stop() error {
	m.end()
	return errors.Join(<-m.done, m.close())
}

// handle serves orders while the device is up.
func (m *mixed) handle(ctx context.Context, p frames.Port) error {
	unpin, err := benchkit.Pin(m.cpu)
	if err != nil {
		return err
	}
	defer unpin()
	for {
		select {
		case <-ctx.Done():
			return nil
		case o := <-m.orders:
			s := &side{c: &o.c, device: m.ends == DeviceEnd, out: p.Sender, in: p.Receiver, length: o.c.lengths()}
			copy(s.template[:], header)
			if s.device {
				s.makeOwn()
			}
			unwatch := context.AfterFunc(ctx, func() { o.stop.Store(true) })
			err := s.obey(o)
			unwatch()
			o.corrupt = s.corrupt
			o.done <- err
			if err != nil {
				return err
			}
		}
	}
}

// obey carries out an order.
func (s *side) obey(o *order) error {
	d := o.c.Direction
	switch {
	case o.drain:
		return s.take(o)
	case d == Echo:
		return s.bounce(o)
	case (d == BoardToHost) != s.device:
		for !o.stop.Load() {
			out, err := s.out.Reserve(o.c.Batch)
			if err != nil {
				return err
			}
			if len(out) == 0 {
				benchkit.Relax(pace)
				continue
			}
			s.fill(out)
			if err := s.out.Send(len(out)); err != nil {
				return err
			}
		}
		return nil
	}
	return s.take(o)
}

// take receives until it is told to stop.
func (s *side) take(o *order) error {
	for !o.stop.Load() {
		in, err := s.in.Receive(o.c.Batch)
		if err != nil {
			return err
		}
		if len(in) == 0 {
			benchkit.Relax(pace)
			continue
		}
		if o.counting.Load() {
			s.checkForeign(in)
			o.moved.Store(s.got)
		}
		if err := s.in.Done(); err != nil {
			return err
		}
	}
	return nil
}

// bounce passes one frame to and fro until it is told to stop. The driver side begins; of testpmd's frames the answer goes before the
// buffer goes back.
func (s *side) bounce(o *order) error {
	turn := !s.device // to send
	for !o.stop.Load() {
		if turn {
			out, err := s.out.Reserve(1)
			if err != nil {
				return err
			}
			if len(out) == 0 {
				continue
			}
			s.fill(out)
			if err := s.out.Send(1); err != nil {
				return err
			}
			turn = false
			continue
		}
		in, err := s.in.Receive(1)
		if err != nil {
			return err
		}
		if len(in) > 0 {
			s.checkForeign(in)
			o.moved.Store(s.got)
			turn = true
		}
	}
	return s.in.Done()
}

// begin has an order carried out, until finish is called. It waits for the link to come up.
func (m *mixed) begin(o *order) error {
	o.done = make(chan error, 1)
	t := time.NewTimer(dpdkMargin)
	defer t.Stop()
	select {
	case m.orders <- o:
		return nil
	case <-t.C:
		return fmt.Errorf("our %s side and %s do not find each other: %w", m.ends, testpmd, ErrNoDPDK)
	}
}

func (m *mixed) finish(o *order) error {
	o.stop.Store(true)
	return <-o.done
}

// MeasureMixed is Measure of the link between our end and testpmd's. Whoever receives counts; of Echo, we do.
func (d *DPDK) MeasureMixed(c Config, ends Ends) (mpps float64, err error) {
	if err := c.defaults(); err != nil {
		return 0, err
	}
	m, p := d.mixed[ends], d.board
	if ends == DriverEnd {
		p = d.host
	}
	if m == nil {
		return 0, fmt.Errorf("there is no link whose %s side is ours", ends)
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	o := &order{c: c}
	mode, burst, first := "rxonly", 32, ""
	ours := (c.Direction == BoardToHost) == (ends == DeviceEnd) // we receive
	switch {
	case c.Direction == Echo:
		drain := &order{c: c, drain: true}
		if err := p.all("set portlist 1", "set fwd rxonly", "start"); err != nil {
			return 0, err
		}
		if err := m.begin(drain); err != nil {
			return 0, err
		}
		time.Sleep(dpdkSettle)
		if err := errors.Join(p.all("stop"), m.finish(drain)); err != nil {
			return 0, err
		}
		if mode, burst, ours = "io", 1, true; ends == DeviceEnd {
			first = " tx_first 1"
		}
	case ours:
		mode = "txonly"
	}
	start := []string{"set portlist 1", "set fwd " + mode, fmt.Sprintf("set txpkts %d", c.Bytes), fmt.Sprintf("set burst %d", burst)}
	if err := p.all(start...); err != nil {
		return 0, err
	}
	// Who answers, or receives, is there first.
	begun := false
	if c.Direction != Echo || ends == DriverEnd {
		if err := p.all("start" + first); err != nil {
			return 0, err
		}
	}
	err = m.begin(o)
	begun = err == nil
	if err == nil && c.Direction == Echo && ends == DeviceEnd {
		err = p.all("start" + first)
	}
	if err == nil {
		time.Sleep(dpdkSettle)
		mpps, err = o.sample(p, ours, c.Duration)
	}
	if begun {
		err = errors.Join(err, m.finish(o))
	}
	err = errors.Join(err, p.all("stop"))
	if err == nil && o.corrupt > 0 {
		err = fmt.Errorf("%d frames were not what was sent", o.corrupt)
	}
	if err == nil && mpps == 0 {
		err = fmt.Errorf("no frames came: %s", p.tail())
	}
	return mpps, err
}

// sample returns the rate over the duration, as we count it, or testpmd.
func (o *order) sample(p *program, ours bool, dur time.Duration) (mpps float64, err error) {
	if !ours {
		if _, err := p.stats(1); err != nil {
			return 0, err
		}
		time.Sleep(dur)
		return p.stats(1)
	}
	o.counting.Store(true)
	n, begin := o.moved.Load(), time.Now()
	time.Sleep(dur)
	return float64(o.moved.Load()-n) / float64(time.Since(begin).Nanoseconds()) * 1e3, nil
}

// all has testpmd do some lines, one after the other.
func (p *program) all(lines ...string) error {
	for _, l := range lines {
		if _, err := p.do(l); err != nil {
			return err
		}
	}
	return nil
}
