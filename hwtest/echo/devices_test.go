package echo_test

import (
	"context"
	"errors"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/hwtest/echo"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/session"
)

// unpaced is for tests that add and remove devices as fast as they can.
var unpaced = session.Pace{Messages: session.Rate{Every: 1, Burst: 1 << 20}, Breaks: session.Rate{Every: 1, Burst: 1 << 20},
	Starts: session.Rate{Every: 1, Burst: 1 << 20}, Changes: session.Rate{Every: 1, Burst: 1 << 20}, Devices: session.Rate{Every: 1, Burst: 1 << 20}}

const beat = 10 * time.Millisecond

// ends are both ends of a link, with echo device 7 held on it; others come and go.
type ends struct {
	t     testing.TB
	ctx   context.Context
	host  *host.Link
	agent *agent.Link
	log   peer.Log
	held  *echo.Driver

	stopHost, stopAgent func()

	mu   sync.Mutex
	made []*echo.Driver // by the agent's Maker
}

// maker makes drivers for the echo devices that the host adds.
func (e *ends) maker(n uint16) (driver.Driver, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	d := &echo.Driver{Dev: n, Key: byte(n) ^ 0x77}
	e.made = append(e.made, d)
	return d, nil
}

// latest returns the driver that was made last; nil: none was.
func (e *ends) latest() *echo.Driver {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.made) == 0 {
		return nil
	}
	return e.made[len(e.made)-1]
}

func (e *ends) makes() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.made)
}

// newEnds starts both ends over a test board. change may change their configuration.
func newEnds(t testing.TB, change func(h *host.Config, a *agent.Config)) *ends {
	t.Helper()
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	e := &ends{t: t, held: &echo.Driver{Dev: 7, Key: 1}}
	var cancel context.CancelFunc
	e.ctx, cancel = context.WithCancel(context.Background())
	t.Cleanup(cancel)
	hc := host.Config{Name: "h", Board: spec, Devices: map[uint16]device.Device{7: &echo.Device{}}, Log: &e.log, Beat: beat, LostBeats: 500, Pace: unpaced}
	ac := agent.Config{Name: "a", Board: spec, Devices: []driver.Driver{e.held}, Drivers: map[uint32]agent.Maker{echo.ID: e.maker}, Shares: 2,
		Log: &e.log, Beat: beat, LostBeats: 500, Pace: unpaced}
	if change != nil {
		change(&hc, &ac)
	}
	e.host, e.agent = host.NewLink(hc), agent.NewLink(ac)
	e.stopHost, e.stopAgent = e.run(e.host), e.run(e.agent)
	t.Cleanup(func() {
		e.stopAgent()
		e.stopHost()
		if t.Failed() {
			t.Logf("log:\n%s", &e.log)
		}
	})
	return e
}

// run runs an end until stop is called, which may be called again.
func (e *ends) run(l interface{ Run(context.Context) error }) (stop func()) {
	ctx, cancel := context.WithCancel(e.ctx)
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	var once sync.Once
	return func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				e.t.Errorf("an end returns %v", err)
			}
		})
	}
}

func (e *ends) until(what string, ok func() bool) {
	e.t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(200 * time.Microsecond) {
		if time.Since(begin) > 30*time.Second {
			e.t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// echoes waits until a driver has had n more answers.
func (e *ends) echoes(d *echo.Driver, n uint64) {
	e.t.Helper()
	from := d.Echoed()
	e.until("a device answers", func() bool { return d.Echoed() >= from+n })
}

// add adds a device on the host and waits until the agent drives it.
func (e *ends) add(n uint16) *echo.Driver {
	e.t.Helper()
	makes := e.makes()
	if err := e.host.AddDevice(e.ctx, n, &echo.Device{}); err != nil {
		e.t.Fatal(err)
	}
	// Where it was removed shortly before, a driver may be made that is given back at once.
	e.until("the agent drives the device", func() bool { return e.makes() > makes && e.latest().Echoed() > 0 })
	d := e.latest()
	if d.Dev != n {
		e.t.Fatalf("a driver is made for device %d, want %d", d.Dev, n)
	}
	return d
}

// remove removes a device on the host and waits until the agent has given it back.
func (e *ends) remove(n uint16, d *echo.Driver) {
	e.t.Helper()
	if err := e.host.RemoveDevice(e.ctx, n); err != nil {
		e.t.Fatal(err)
	}
	e.until("the agent gives the device back", func() bool { return d.Closed() })
}

// untouched checks that the held device and the link never went down.
func (e *ends) untouched() {
	e.t.Helper()
	e.echoes(e.held, 10)
	h, a := e.host.Status().Counters, e.agent.Status().Counters
	for _, c := range []struct {
		name      string
		got, want uint64
	}{{"the host's handshakes", h["link_ups"], 1}, {"the agent's handshakes", a["link_ups"], 1}, {"resets by the host", h["device_resets"], 0},
		{"broken devices", a["broken"], 0}, {"resets asked for", a["host_reset"], 0}, {"requests without an answer", a["call_timeout"], 0}} {
		if c.got != c.want {
			e.t.Errorf("%s: %d, want %d", c.name, c.got, c.want)
		}
	}
}

func openFiles(t testing.TB) int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// Devices come and go while another one on the same link goes on: nothing of it is touched, and nothing is left behind.
func TestAddRemove(t *testing.T) {
	e := newEnds(t, nil)
	e.echoes(e.held, 10)
	round := func(n uint16) {
		e.remove(n, e.add(n))
		if free, _ := e.agent.Shares(); free != 1 {
			t.Fatalf("%d parts of the memory are free, want 1", free)
		}
	}
	for n := uint16(8); n < 11; n++ { // what is made once, and kept, is there now
		round(n)
	}
	files, routines := openFiles(t), runtime.NumGoroutine()
	const rounds = 15
	for i := range rounds {
		round(uint16(8 + i%3))
	}
	e.untouched()
	if c := e.agent.Status().Counters; c["added"] != rounds+3 || c["removed"] != rounds+3 {
		t.Errorf("the agent has added %d and removed %d devices, want %d", c["added"], c["removed"], rounds+3)
	}
	if c := e.host.Status().Counters; c["device_events"] != 2*(rounds+3) {
		t.Errorf("the host has sent %d EVENT_DEVICE, want %d", c["device_events"], 2*(rounds+3))
	}
	e.until("goroutines end", func() bool { return runtime.NumGoroutine() <= routines })
	if n := openFiles(t); n != files {
		t.Errorf("%d open files, %d before", n, files)
	}
	if n := len(e.agent.Status().Devices) + len(e.host.Status().Devices); n != 2 {
		t.Errorf("%d devices are left, want 1 on each end", n)
	}
}

// A device that is removed at any moment of its driver's start costs no time-out, and nobody else anything.
func TestRemoveDuringStart(t *testing.T) {
	t.Parallel()
	e := newEnds(t, nil)
	e.echoes(e.held, 10)
	for i := range 40 {
		if err := e.host.AddDevice(e.ctx, 8, &echo.Device{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * 300 * time.Microsecond)
		if err := e.host.RemoveDevice(e.ctx, 8); err != nil {
			t.Fatal(err)
		}
	}
	e.until("the agent has given all back", func() bool { return len(e.agent.Status().Devices) == 1 })
	d := e.add(8)
	e.echoes(d, 10)
	e.remove(8, d)
	e.untouched()
}

// What cannot be is a typed error, and changes nothing.
func TestAddRemoveErrors(t *testing.T) {
	t.Parallel()
	e := newEnds(t, nil)
	is := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	is("added twice on the host", e.host.AddDevice(e.ctx, 7, &echo.Device{}), host.ErrDeviceExists)
	is("removed on the host, not there", e.host.RemoveDevice(e.ctx, 8), host.ErrNoDevice)
	is("added twice on the agent", e.agent.AddDevice(e.ctx, &echo.Driver{Dev: 7}), agent.ErrDeviceExists)
	is("removed on the agent, not there", e.agent.RemoveDevice(e.ctx, 8), agent.ErrNoDevice)
	d := e.add(8)
	is("more than there is memory for", e.agent.AddDevice(e.ctx, &echo.Driver{Dev: 9}), driver.ErrNoShare)
	e.remove(8, d)
	is("removed twice", e.host.RemoveDevice(e.ctx, 8), host.ErrNoDevice)

	// The agent gives up a device that the host goes on offering: it does not come back by itself.
	d = e.add(8)
	if err := e.agent.RemoveDevice(e.ctx, 8); err != nil {
		t.Error(err)
	}
	if !d.Closed() {
		t.Error("the driver of a removed device is not closed")
	}
	makes := e.makes()
	e.remove(8, d)
	if e.add(8); e.makes() != makes+1 {
		t.Errorf("%d drivers were made of a device given up once, want %d", e.makes(), makes+1)
	}
	e.untouched()
	e.stopAgent()
	e.stopHost()
	is("added after the end", e.host.AddDevice(e.ctx, 12, &echo.Device{}), session.ErrEnded)
	is("removed after the end", e.agent.RemoveDevice(e.ctx, 7), session.ErrEnded)
}

// Where memory is used up the link lives, one line tells, and a device that goes away makes room for the one that waits.
func TestAddWithoutMemory(t *testing.T) {
	t.Parallel()
	e := newEnds(t, nil)
	first := e.add(8)
	for n := uint16(9); n < 12; n++ {
		if err := e.host.AddDevice(e.ctx, n, &echo.Device{}); err != nil {
			t.Fatal(err)
		}
	}
	e.until("the agent tells", func() bool { return strings.Contains(e.log.String(), "no memory is left") })
	if e.makes() != 1 {
		t.Errorf("%d drivers were made, there is memory for 1", e.makes())
	}
	e.remove(8, first)
	e.until("one that waits has its turn", func() bool { return e.makes() == 2 && e.latest().Echoed() > 0 })
	e.remove(9, e.latest())
	e.until("the next one has its turn", func() bool { return e.makes() == 3 && e.latest().Echoed() > 0 })
	e.untouched()
}

// What was added or removed while one end was away is found when the link comes up again.
func TestAddRemoveWhileAway(t *testing.T) {
	t.Parallel()
	var hc host.Config
	var ac agent.Config
	e := newEnds(t, func(h *host.Config, a *agent.Config) { a.Shares = 3; hc, ac = *h, *a })
	gone := e.add(8)

	// The agent is away.
	e.stopAgent()
	if err := e.host.RemoveDevice(e.ctx, 8); err != nil {
		t.Error(err)
	}
	if err := e.host.AddDevice(e.ctx, 9, &echo.Device{}); err != nil {
		t.Error(err)
	}
	if !gone.Closed() {
		t.Error("an agent that ends leaves a driver open")
	}
	e.held = &echo.Driver{Dev: 7, Key: 2}
	ac.Devices = []driver.Driver{e.held}
	e.agent = agent.NewLink(ac)
	e.stopAgent = e.run(e.agent)
	e.until("the agent drives what was added", func() bool { return e.latest().Dev == 9 && e.latest().Echoed() > 0 })
	if n := len(e.agent.Status().Devices); n != 2 {
		t.Errorf("the agent drives %d devices, want 2", n)
	}

	// The host is away, and comes back with another set. What the agent is given to drive meanwhile waits for it.
	nine := e.latest()
	e.stopHost()
	own := &echo.Driver{Dev: 11, Key: 3}
	if err := e.agent.AddDevice(e.ctx, own); err != nil {
		t.Error(err)
	}
	hc.Devices = map[uint16]device.Device{7: &echo.Device{}, 11: &echo.Device{}}
	e.host = host.NewLink(hc)
	if err := e.host.AddDevice(e.ctx, 12, &echo.Device{}); err != nil { // before Run
		t.Error(err)
	}
	if err := e.host.RemoveDevice(e.ctx, 12); err != nil {
		t.Error(err)
	}
	e.stopHost = e.run(e.host)
	e.echoes(e.held, 10)
	e.echoes(own, 10)
	e.until("the agent gives back what is gone", func() bool { return nine.Closed() })
	if free, all := e.agent.Shares(); free != 1 || all != 3 {
		t.Errorf("%d of %d parts of the memory are free, want 1 of 3", free, all)
	}

	// With the host away, the agent gives a device back all the same.
	e.stopHost()
	if err := e.agent.RemoveDevice(e.ctx, 11); err != nil || !own.Closed() {
		t.Errorf("removed without a host: %v, closed %v", err, own.Closed())
	}
	if free, _ := e.agent.Shares(); free != 2 {
		t.Errorf("%d parts of the memory are free, want 2", free)
	}
}

// An agent that drives what it was started with, and knows no others, is not disturbed by devices that come and go.
func TestAgentWithoutMakers(t *testing.T) {
	t.Parallel()
	e := newEnds(t, func(_ *host.Config, a *agent.Config) { a.Drivers, a.Shares = nil, 0 })
	e.echoes(e.held, 10)
	for range 20 {
		if err := e.host.AddDevice(e.ctx, 8, &echo.Device{}); err != nil {
			t.Fatal(err)
		}
		if err := e.host.RemoveDevice(e.ctx, 8); err != nil {
			t.Fatal(err)
		}
	}
	e.untouched()
	if c := e.agent.Status().Counters; c["searches"] != 0 || c["added"] != 0 {
		t.Errorf("the agent searched %d times and added %d devices, want none", c["searches"], c["added"])
	}
	// A device of its own that the host takes away and gives back comes up again.
	if err := e.host.RemoveDevice(e.ctx, 7); err != nil {
		t.Fatal(err)
	}
	e.until("the host's device is gone", func() bool { return len(e.host.Status().Devices) == 0 })
	if err := e.host.AddDevice(e.ctx, 7, &echo.Device{}); err != nil {
		t.Fatal(err)
	}
	e.echoes(e.held, 10)
	if h := e.host.Status().Counters; h["link_ups"] != 1 {
		t.Errorf("the link came up %d times, want 1", h["link_ups"])
	}
}
