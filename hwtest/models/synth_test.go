//go:build linux

package models_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/generic"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/hwtest/models"
	"github.com/boardlink/boardlink/mmio"
)

// describe reads a file under testdata.
func describe(t testing.TB, file string) *generic.Config {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	c, problems := generic.Check(data)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return c
}

// synthEnds opens both ends of a Synth.
type synthEnds struct {
	s    *models.Synth
	c    *generic.Config
	mu   sync.Mutex
	f    *models.Function
	ends [2]*generic.Board
}

func (e *synthEnds) openers() [2]opener { return [2]opener{e.openHost, e.openAgent} }

func (e *synthEnds) openHost(o board.Options) (board.Board, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.f = e.s.Function()
	b, err := generic.New("generic:synth", e.f, e.c, o, false)
	if err != nil {
		return nil, err
	}
	e.ends[board.Host] = b
	return b, nil
}

// openAgent gives the board's end what its processor has: RAM at SynthWindow, registers, the outbound window.
func (e *synthEnds) openAgent(o board.Options) (board.Board, error) {
	at := func(key string, p generic.Place, n uint64, want mmio.Kind) (mmio.Mem, error) {
		switch {
		case p.Path != "" || p.Map != 0:
			return mmio.Mem{}, fmt.Errorf("%s: path %s", key, p.Path)
		case key == "window" && p.Offset == models.SynthWindow:
			return e.s.Mem.Local(0, n), nil
		case key == "pool" && p.Offset >= models.SynthOutbound:
			return e.s.Outbound(dma.Addr(p.Offset-models.SynthOutbound), n), nil
		}
		return e.s.Registers().Slice(p.Offset, n)
	}
	b, err := generic.NewLocal("generic:synth", e.c, o, at, e.s.Core)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	e.ends[board.Agent] = b
	e.mu.Unlock()
	return b, nil
}

func newSynth(t testing.TB, widths ...uint) *models.Synth {
	t.Helper()
	s, err := models.NewSynth(4<<20, widths...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Err(); err != nil {
			t.Error(err)
		}
		s.Close()
	})
	return s
}

// TestGenericLink: the described board, 16-bit accesses only, with a cause register that is cleared by zeros at the
// host and by reading at the board.
func TestGenericLink(t *testing.T) {
	s := newSynth(t, 2)
	e := &synthEnds{s: s, c: describe(t, "synth.toml")}
	r := start(t, e.openers())
	r.waitUp()
	r.try(0)
	hd, ad := e.ends[board.Host].Demux().Counters(), e.ends[board.Agent].Demux().Counters()
	t.Logf("host: %+v; agent: %+v", hd, ad)
	if hd.Interrupts < 50 || ad.Interrupts < 50 || hd.Stuck+hd.Dead+ad.Stuck+ad.Dead != 0 {
		t.Errorf("interrupts: host %+v, agent %+v", hd, ad)
	}
	s.Stick(1 << 3)
	r.try(0)
	if st := r.agent.Status(); st.Placement != "window" {
		t.Errorf("placement %s", st.Placement)
	}
}

// TestGenericPush: the board reaches memory of the carrier by DMA, mapped for it and nothing else. No read of the window
// moves a packet.
func TestGenericPush(t *testing.T) {
	s := newSynth(t, 1, 2, 4, 8)
	c := describe(t, "synth-push.toml")
	e := &synthEnds{s: s, c: c}
	r := start(t, e.openers(), func(r *rig) { r.placement = "push" })
	r.waitUp()
	r.try(0)
	if p := r.agent.Status().Placement; p != "push" {
		t.Errorf("placement %s", p)
	}
	maps := e.f.DMAMaps()
	if len(maps) != 1 || maps[0].Size != c.Host.Pool.Size {
		t.Errorf("DMA maps: %+v", maps)
	}
	if p, ok := e.ends[board.Host].Pool(); !ok || uint64(p.Addr) != uint64(maps[0].Addr)+c.Host.Pool.BusOffset {
		t.Errorf("pool: %+v", p)
	}
	if n := r.acct[0].Reads; n != 0 {
		t.Errorf("the host read %d times across the bus for packets", n)
	}
	f := e.f
	r.close()
	if n := len(f.DMAMaps()); n != 0 || !f.Closed() {
		t.Errorf("%d DMA maps left", n)
	}
}

// TestGenericMSIX: a board that interrupts by messages needs no cause register.
func TestGenericMSIX(t *testing.T) {
	s := newSynth(t, 1, 2, 4, 8)
	c := describe(t, "synth.toml")
	c.Host.Interrupt = &generic.Interrupt{Kind: "msix", Vectors: 3}
	c.Host.Window.MaxAccess, c.Host.Window.MinAccess = 0, 0
	f := models.NewFunction(models.FunctionConfig{Vendor: c.Vendor, Device: c.Device, Vectors: 4,
		BARs: []models.BARConfig{{Index: 0, Size: 4096, Bus: s.Mem}, {Index: 2, Size: 1 << 20, Bus: s.Mem}}})
	b, err := generic.New("generic:msix", f, c, board.Options{}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if i := b.Self(); i.Method != board.RingBoard || i.Vectors != 3 {
		t.Errorf("%+v", i)
	}
	f.Raise(2)
	f.Raise(3) // not enabled
	for v, want := range []uint64{0, 0, 1, 0} {
		if n, err := b.Waiter(uint32(v)).Ack(); n != want || err != nil {
			t.Errorf("vector %d: %d, %v", v, n, err)
		}
	}
	// What the description says and the function is not.
	for _, bad := range []struct {
		kind string
		dev  uint16
		want string
	}{{"intx", c.Device, "host.interrupt.kind"}, {"msix", 0x7777, "7777"}} {
		c.Host.Interrupt.Kind, c.Device = bad.kind, bad.dev
		g := models.NewFunction(models.FunctionConfig{Vendor: c.Vendor, Device: 0xb0a2, Vectors: 4,
			BARs: []models.BARConfig{{Index: 0, Size: 4096, Bus: s.Mem}, {Index: 2, Size: 1 << 20, Bus: s.Mem}}})
		if _, err := generic.New("generic:msix", g, c, board.Options{}, false); err == nil || !strings.Contains(err.Error(), bad.want) || !g.Closed() {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}
