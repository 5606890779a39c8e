package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
)

// tripper is a driver of queue pairs by which the test sends messages: see front.trip. Up does what
// a virtio driver has to, in the order of virtio 1.2, 3.1.1.
type tripper struct {
	t     testing.TB
	want  virtio.Features
	pairs int

	mu       sync.Mutex
	f        *front // nil: down
	broken   func(error)
	accepted virtio.Features
	config   virtio.NetConfig
	ups      int
	err      error // of Failed
}

func newTripper(t testing.TB, want virtio.Features, pairs int) *tripper {
	return &tripper{t: t, want: want, pairs: pairs}
}

func (d *tripper) Name() string                       { return "trip0" }
func (d *tripper) Number() uint16                     { return 0 }
func (d *tripper) DeviceID() uint32                   { return virtio.IDNet }
func (d *tripper) Joined() string                     { return "the test" }
func (d *tripper) Doorbells() int                     { return 2 * d.pairs }
func (d *tripper) Pairs() (int, bool)                 { return d.pairs, true }
func (d *tripper) LimitPairs(int)                     {}
func (d *tripper) Reconfigure(driver.Transport) error { return nil }
func (d *tripper) OnChange(func())                    {}
func (d *tripper) LinkUp() bool                       { return true }
func (d *tripper) Remade() bool                       { return false }
func (d *tripper) Warning() string                    { return "" }
func (d *tripper) ShortOf() string                    { return "" }
func (d *tripper) Unmet() []string                    { return nil }
func (d *tripper) Status() status.Device              { return status.Device{Name: "trip0", Type: "net"} }
func (d *tripper) Close() error                       { return nil }

func (d *tripper) Failed(err error) {
	d.mu.Lock()
	d.err = err
	d.mu.Unlock()
}

func (d *tripper) Down() {
	d.mu.Lock()
	d.f = nil
	d.mu.Unlock()
}

func (d *tripper) Up(t driver.Transport, m driver.Layout, broken func(error)) error {
	if s, err := t.SetStatus(0); err != nil || s != 0 {
		return fmt.Errorf("reset: status %#x, %w", s, err)
	}
	set := virtio.StatusAcknowledge | virtio.StatusDriver
	if _, err := t.SetStatus(set); err != nil {
		return err
	}
	offered, err := t.Features()
	if err != nil {
		return err
	}
	b, err := t.Config(0, virtio.NetConfigLen)
	if err != nil {
		return err
	}
	f := offered.And(d.want)
	if err := t.SetFeatures(f); err != nil {
		return err
	}
	set |= virtio.StatusFeaturesOK
	if s, err := t.SetStatus(set); err != nil || s&virtio.StatusFeaturesOK == 0 {
		return fmt.Errorf("features: status %#x, %w", s, err)
	}
	fr := &front{t: d.t, mem: m.Near.Region.Mem, reg: *m.Near.Region}
	for i := 0; i < 2*d.pairs; i++ {
		if max, err := t.QueueMax(i); err != nil || max < ringSize {
			return fmt.Errorf("queue %d: at most %d descriptors, %w", i, max, err)
		}
		fr.queue(i, f)
		q := &fr.qs[i]
		if err := t.SetQueue(i, ringSize, q.c.Desc.Addr(), q.c.Driver.Addr(), q.c.Device.Addr()); err != nil {
			return err
		}
		q.kick, q.call = t.Kick(i).(*doorbell.Eventfd), t.Call(i).(*doorbell.Eventfd)
	}
	set |= virtio.StatusDriverOK
	if s, err := t.SetStatus(set); err != nil || s != set {
		return fmt.Errorf("start: status %#x, %w", s, err)
	}
	for i := 0; i < 2*d.pairs; i++ {
		if err := t.(driver.Enabler).EnableQueue(i, true); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.f, d.broken, d.accepted, d.config = fr, broken, f, virtio.DecodeNetConfig(b)
	d.ups++
	return nil
}

// up waits until the driver has come up n times, and is up.
func (d *tripper) up(n int) *front {
	d.t.Helper()
	var f *front
	eventually(d.t, fmt.Sprintf("up for the %dth time", n), func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		f = d.f
		return f != nil && d.ups == n
	})
	return f
}

// frontend is a Frontend that runs.
type frontend struct {
	*Frontend
	log  *testLog
	stop func() error
}

func newFrontend(t testing.TB, spec Spec, d driver.Driver, change func(*FrontendConfig)) *frontend {
	t.Helper()
	f := &frontend{log: &testLog{}}
	c := FrontendConfig{Name: "front0", Board: Prefix + spec.Path, Spec: spec, Driver: d, MTU: func() int { return 1400 }, Memory: frontSize, Log: f.log}
	if change != nil {
		change(&c)
	}
	f.Frontend = NewFrontend(c)
	ctx, cancel := context.WithCancel(context.Background())
	if err := f.Open(ctx); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	var once sync.Once
	var err error
	f.stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case err = <-done:
			case <-time.After(limit):
				err = errors.New("the front end does not stop")
			}
		})
		return err
	}
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// count waits until a counter has a value.
func (f *frontend) count(t testing.TB, name string, want uint64) {
	t.Helper()
	if _, ok := f.n.load()[name]; !ok {
		t.Fatalf("there is no counter %s", name)
	}
	eventually(t, fmt.Sprintf("%s: %d", name, want), func() bool { return f.n.load()[name] == want })
}

// TestFrontend: both ends of this package joined: messages with every byte checked by two queue
// pairs, across a broken driver, a back end that goes and another one that comes, and the end.
func TestFrontend(t *testing.T) {
	for _, k := range kinds {
		for _, server := range []bool{false, true} {
			k, server := k, server
			t.Run(fmt.Sprintf("%s server=%v", k.name, server), func(t *testing.T) {
				t.Parallel()
				path := t.TempDir() + "/s"
				serve := func() (*echo, *door) {
					e := newEcho(t, 2)
					d := &door{path: path, log: &testLog{}}
					d.Door = New(Config{Name: "door0", Board: Prefix + path, Spec: Spec{Path: path, FD: -1, Client: server}, Device: e, Log: d.log})
					d.run(t)
					return e, d
				}
				drv := newTripper(t, k.f.Or(virtio.FeaturesOf(virtio.NetMQ, virtio.NetMTU)), 2)
				e, d := serve()
				f := newFrontend(t, Spec{Path: path, FD: -1, Client: !server}, drv, nil)
				trips := func(n int, e *echo) {
					t.Helper()
					fr := drv.up(n)
					for pair := 0; pair < 2; pair++ {
						pair := pair
						fr.trip(pair, 150, byte(n+pair), func() error { _, err := e.echo(pair); return err })
						for _, i := range []int{2 * pair, 2*pair + 1} {
							if n, err := fr.qs[i].call.Ack(); n == 0 || err != nil {
								t.Errorf("queue %d was not called: %v", i, err)
							}
						}
					}
				}
				trips(1, e)
				if !drv.accepted.Has(virtio.NetMQ) || drv.accepted.Has(virtio.NetCtrlVQ) || drv.config.MaxQueuePairs != 2 || drv.config.MTU != 1400 || !drv.config.LinkUp {
					t.Errorf("accepted %s, configuration %+v", drv.accepted, drv.config)
				}
				if s := f.Status(); s.State != frontUp || len(s.Regions) != 1 || s.Regions[0].Size != frontSize {
					t.Errorf("%+v", s)
				}
				// The same connection, after a reset.
				drv.broken(errors.New("a test"))
				trips(2, e)
				if n := d.n.load(); n["connections"] != 1 || n["queue_starts"] != 8 || n["failed"] != 0 || n["unknown"] != 0 {
					t.Errorf("%v", n)
				}
				// Another back end.
				if err := d.stop(); err != nil {
					t.Fatal(err)
				}
				eventually(t, "down", func() bool { return f.Status().State != frontUp })
				e, d = serve()
				trips(3, e)
				// This side ends: the queues are stopped in order.
				if err := f.stop(); err != nil {
					t.Fatal(err)
				}
				if running, started, _ := e.state(); running || started != 0 {
					t.Errorf("the device runs %v, queues %#x", running, started)
				}
				if n := d.n.load(); n["queue_stops"] != 4 || n["failed"] != 0 || n["descriptors_closed"] != 0 {
					t.Errorf("%v", n)
				}
				if n := f.n.load(); n["bring_ups"] != 3 || n["connections"] != 2 || n["lost"] != 1 || n["broken"] != 1 || n["refused"] != 0 ||
					n["malformed"] != 0 || n["unexpected"] != 0 || n["timeouts"] != 0 {
					t.Errorf("%v", n)
				}
			})
		}
	}
}

// TestFrontendSpec reads specs of front ends.
func TestFrontendSpec(t *testing.T) {
	for _, c := range []struct {
		text string
		want Spec
		ok   bool
	}{
		{"vhost-user:/run/y.sock", Spec{Path: "/run/y.sock", FD: -1, Client: true}, true},
		{"vhost-user:/run/y.sock,server", Spec{Path: "/run/y.sock", FD: -1}, true},
		{"vhost-user:/run/y.sock,server,mode=0660", Spec{Path: "/run/y.sock", FD: -1, Mode: 0o660}, true},
		{"vhost-user:fd=3", Spec{FD: 3}, true},
		{"vhost-user:/run/y.sock,mode=0660", Spec{}, false},
		{"vhost-user:/run/y.sock,client", Spec{}, false},
		{"vhost-user:/run/y.sock,queues=2", Spec{}, false},
		{"vhost-user:fd=3,server", Spec{}, false},
		{"vhost-user:", Spec{}, false},
	} {
		if s, err := ParseFrontendSpec(c.text); s != c.want || (err == nil) != c.ok {
			t.Errorf("%s: %+v, %v", c.text, s, err)
		}
	}
}
