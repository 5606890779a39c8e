//go:build linux

package models_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/mpc83xx"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/hwtest/models"
	"github.com/boardlink/boardlink/pci"
)

const (
	chipMem    = 16 << 20
	chipWindow = 8 << 20
	chipTarget = 8 << 20 // local address of the window
)

func newChip(t testing.TB) *models.MPC8349 {
	t.Helper()
	c, err := models.NewMPC8349(chipMem, chipWindow, chipTarget)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Err(); err != nil {
			t.Error(err)
		}
		c.Close()
	})
	return c
}

// chipEnds opens both ends of a chip, and remembers the last of each.
type chipEnds struct {
	chip   *models.MPC8349
	cfg    mpc83xx.Config
	noIRQ  bool // agent
	mu     sync.Mutex
	f      *models.Function
	pulled bool
	ends   [2]*mpc83xx.Board
	opened [2]int
}

func (e *chipEnds) openers() [2]opener { return [2]opener{e.openHost, e.openAgent} }

func (e *chipEnds) openHost(o board.Options) (board.Board, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.pulled {
		return nil, &board.Error{Spec: "model", Reason: "pulled", Class: board.ErrAbsent}
	}
	f := e.chip.Function()
	b, err := mpc83xx.New("mpc83xx:model", f, o, e.cfg)
	if err != nil {
		if !f.Closed() {
			return nil, errors.New("New failed and did not close its function")
		}
		return nil, err
	}
	e.f, e.ends[board.Host] = f, b
	e.opened[board.Host]++
	return b, nil
}

func (e *chipEnds) openAgent(o board.Options) (board.Board, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := mpc83xx.Local{MU: e.chip.MU(), Window: e.chip.Mem.Local(chipTarget, chipWindow), Bus: dma.Addr(chipTarget)}
	if !e.noIRQ {
		l.IRQ = e.chip.Core
	}
	b, err := mpc83xx.NewLocal("mpc83xx:model", l, o)
	if err != nil {
		return nil, err
	}
	e.ends[board.Agent] = b
	e.opened[board.Agent]++
	return b, nil
}

func (e *chipEnds) pull() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.pulled = true
	e.f.Pull()
}

func (e *chipEnds) plug() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.pulled = false
}

func (e *chipEnds) end(s board.Side) *mpc83xx.Board {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ends[s]
}

// TestMPC83xxLink: both ends on the chip, pings and checked TCP both ways over two devices; the doorbells did it, no
// poll fallback.
func TestMPC83xxLink(t *testing.T) {
	chip := newChip(t)
	e := &chipEnds{chip: chip}
	r := start(t, e.openers(), func(r *rig) { r.devices = 2 })
	r.waitUp()
	for d := 0; d < 2; d++ {
		r.try(d)
	}
	hd, ad := e.end(board.Host).Demux().Counters(), e.end(board.Agent).Demux().Counters()
	t.Logf("host: %+v, line %+v; agent: %+v, line %+v", hd, chip.PCI.Counters(), ad, chip.Core.Counters())
	if hd.Interrupts < 100 || ad.Interrupts < 100 {
		t.Errorf("hardly any interrupts: host %d, agent %d", hd.Interrupts, ad.Interrupts)
	}
	if hd.Stuck != 0 || ad.Stuck != 0 || hd.Dead != 0 || ad.Dead != 0 {
		t.Errorf("interrupts that were stuck or dead: host %+v, agent %+v", hd, ad)
	}
	if n := chip.PCI.Counters().Taken; n < hd.Interrupts || n > hd.Interrupts+1 {
		t.Errorf("the chip's INTA was taken %d times, the host counts %d", n, hd.Interrupts)
	}
	for _, l := range []struct {
		side string
		n, w uint64
	}{{"host", bells(r.host.Status(), "rescued"), bells(r.host.Status(), "wakeups")}, {"agent", bells(r.agent.Status(), "rescued"), bells(r.agent.Status(), "wakeups")}} {
		if l.n > l.w/20+2 {
			t.Errorf("%s: %d rescued by polling, %d wake-ups", l.side, l.n, l.w)
		}
	}
	r.close()
	// Both masked again, and no doorbell left.
	if out, in := chip.Masks(); out&mpc83xx.ODI == 0 || in&mpc83xx.IDI == 0 {
		t.Errorf("masks after the end: %#x, %#x", out, in)
	}
	if !e.f.Closed() {
		t.Error("the function is still open")
	}
	if reads, writes := chip.Mem.Accesses(); reads == 0 || writes == 0 {
		t.Errorf("%d reads and %d writes of the window", reads, writes)
	}
}

// TestMPC83xxLostInterrupts: with both lines cut, the poll fallback carries the traffic and counts it.
func TestMPC83xxLostInterrupts(t *testing.T) {
	chip := newChip(t)
	e := &chipEnds{chip: chip}
	r := start(t, e.openers())
	r.waitUp()
	chip.PCI.Cut(true)
	chip.Core.Cut(true)
	r.try(0)
	if n := bells(r.host.Status(), "rescued") + bells(r.agent.Status(), "rescued"); n == 0 {
		t.Error("nothing rescued, with both interrupts cut")
	}
	chip.PCI.Cut(false)
	chip.Core.Cut(false)
	r.try(0)
}

// TestMPC83xxPolling: neither side has an interrupt; ring method 0 both ways, and nobody rings.
func TestMPC83xxPolling(t *testing.T) {
	chip := newChip(t)
	e := &chipEnds{chip: chip, cfg: mpc83xx.Config{NoInterrupts: true}, noIRQ: true}
	r := start(t, e.openers())
	r.waitUp()
	r.try(0)
	if out, in := chip.Rings(); out != 0 || in != 0 {
		t.Errorf("sides that poll were rung: %d, %d", out, in)
	}
	if n := bells(r.host.Status(), "polled"); n == 0 {
		t.Error("the host found nothing by polling")
	}
}

// TestMPC83xxStuck: a doorbell bit that cannot be cleared keeps INTA asserted. The link goes on, and the host does
// not spend its time on interrupts.
func TestMPC83xxStuck(t *testing.T) {
	chip := newChip(t)
	e := &chipEnds{chip: chip}
	r := start(t, e.openers())
	r.waitUp()
	chip.Stick(1<<7, 1<<9)
	time.Sleep(200 * time.Millisecond)
	before := e.end(board.Host).Demux().Counters()
	time.Sleep(300 * time.Millisecond)
	after := e.end(board.Host).Demux().Counters()
	// One each 10 ms, of which each is one line interrupt.
	if n := after.Interrupts - before.Interrupts; n == 0 || n > 60 {
		t.Errorf("%d interrupts in 300 ms of a stuck doorbell", n)
	}
	if after.Stuck == 0 {
		t.Errorf("a stuck doorbell is not counted: %+v", after)
	}
	r.try(0)
	chip.Unstick()
	eventually(t, "quiet again", func() bool { out, in := chip.Doorbells(); return out>>7&1 == 0 && in>>9&1 == 0 })
	r.try(0)
	if a := e.end(board.Agent).Demux().Counters(); a.Stuck == 0 {
		t.Errorf("the agent counted no stuck doorbell: %+v", a)
	}
}

// TestMPC83xxAllOnes: the chip does not answer for a while, as in reset; the link goes down and comes back.
func TestMPC83xxAllOnes(t *testing.T) {
	chip := newChip(t)
	e := &chipEnds{chip: chip}
	r := start(t, e.openers())
	r.waitUp()
	chip.Answer(false)
	eventually(t, "link down", func() bool { return !carries(r.host.Status()) })
	chip.Answer(true)
	r.waitUp()
	r.try(0)
}

// TestMPC83xxPulled: the board is pulled under load, and put back.
func TestMPC83xxPulled(t *testing.T) {
	chip := newChip(t)
	e := &chipEnds{chip: chip}
	r := start(t, e.openers())
	r.waitUp()
	first := e.f
	e.pull()
	eventually(t, "function given back", first.Closed)
	if r.host.Status().State == "up" {
		t.Error("up without a board")
	}
	e.plug()
	r.waitUp()
	r.try(0)
	if e.opened[board.Host] != 2 {
		t.Errorf("the host's end was opened %d times", e.opened[board.Host])
	}
}

// TestMPC83xxTarget: the host sets the inbound window up where it is asked to, and says what is wrong else.
func TestMPC83xxTarget(t *testing.T) {
	chip := newChip(t)
	pitar, piwar := chip.Window()
	open := func(cfg mpc83xx.Config) (*mpc83xx.Board, error) {
		b, err := mpc83xx.New("mpc83xx:model", chip.Function(), board.Options{}, cfg)
		if err == nil {
			t.Cleanup(func() { b.Close() })
		}
		return b, err
	}
	// The loader left it off, and elsewhere.
	chip.SetWindow(0, piwar&^uint32(mpc83xx.PIWAREnable|mpc83xx.PIWARReadSnp))
	b, err := open(mpc83xx.Config{Target: chipTarget, SetTarget: true, NoInterrupts: true})
	if err != nil {
		t.Fatal(err)
	}
	if p, w := chip.Window(); p != pitar || w != piwar {
		t.Errorf("PITAR0 %#x PIWAR0 %#x, want %#x, %#x", p, w, pitar, piwar)
	}
	w := b.Window()
	w.Mem.Store32(64, 0x11223344)
	m := chip.Mem.Local(chipTarget, chipWindow)
	if v := m.Load32(64); v != 0x11223344 {
		t.Errorf("the board reads %#x", v)
	}
	if _, err := open(mpc83xx.Config{Target: chipTarget + 0x1000, SetTarget: true}); !errors.Is(err, board.ErrInput) {
		t.Errorf("a target that is not a multiple of the size: %v", err)
	}
}

// TestMPC83xxRefused: functions that are no such board, or do not answer.
func TestMPC83xxRefused(t *testing.T) {
	chip := newChip(t)
	chip.Answer(false)
	if _, err := mpc83xx.New("mpc83xx:model", chip.Function(), board.Options{}, mpc83xx.Config{}); !errors.Is(err, board.ErrAbsent) {
		t.Errorf("all ones: %v", err)
	}
	chip.Answer(true)
	for name, c := range map[string]models.FunctionConfig{
		"vendor":    {Vendor: 0x1234},
		"no BARs":   {Vendor: mpc83xx.Vendor},
		"small BAR": {Vendor: mpc83xx.Vendor, BARs: []models.BARConfig{{Index: 0, Size: 4096, Bus: chip.Mem}}},
	} {
		f := models.NewFunction(c)
		if _, err := mpc83xx.New("mpc83xx:model", f, board.Options{}, mpc83xx.Config{}); err == nil || !f.Closed() {
			t.Errorf("%s: %v, closed %v", name, err, f.Closed())
		}
	}
	f := chip.Function()
	f.Pull()
	if _, err := mpc83xx.New("mpc83xx:model", f, board.Options{}, mpc83xx.Config{}); !errors.Is(err, board.ErrAbsent) {
		t.Errorf("pulled: %v", err)
	}
	if !errors.Is(f.Gone(), pci.ErrGone) {
		t.Errorf("Gone: %v", f.Gone())
	}
}
