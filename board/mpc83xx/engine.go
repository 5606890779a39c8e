package mpc83xx

import (
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/internal/fn"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/pci"
)

// highest is the highest bus address that the chip reaches.
const highest = 1<<32 - 1

// channels reads engine=2+3.
func channels(a fn.Arg) ([]int, error) {
	s, ok := a.Get("engine")
	if !ok || s == "off" {
		return nil, nil
	}
	var l []int
	used := 0
	for _, p := range strings.Split(s, "+") {
		n, err := strconv.ParseUint(p, 10, 8)
		if err != nil || n >= DMAChannels || used>>n&1 != 0 {
			return nil, a.Bad("engine=%s: channels of the DMA engine, 0 to %d, each once, with + between them, are wanted: those that the board itself does not use", s, DMAChannels-1)
		}
		used |= 1 << n
		l = append(l, int(n))
	}
	return l, nil
}

// outbound is the window by which the engine reaches the host's memory.
type outbound struct {
	mu    sync.Mutex
	potar fn.Word
	local uint64 // address of its first byte
	size  uint64
	was   uint32 // POTAR as the boot loader left it
	base  uint64 // PCI address where it leads to
	ours  bool   // it leads to our memory
}

func (b *Board) openEngine(f pci.Function, immr *pci.Mapping, window uint64, c Config) error {
	word := func(off uint64) (fn.Word, error) {
		m, err := immr.Mem(off, 4)
		return fn.Word{Mem: m, Width: 32, Big: true}, err
	}
	if c.Outbound < 0 || c.Outbound >= POTs {
		return b.bad(board.ErrInput, "outbound=%d: there are windows 0 to %d", c.Outbound, POTs-1)
	}
	at := uint64(POT + c.Outbound*POTSize)
	var pobar, pocmr, pitar fn.Word
	var err error
	for _, r := range []struct {
		w   *fn.Word
		off uint64
	}{{&b.out.potar, at + POTAR}, {&pobar, at + POBAR}, {&pocmr, at + POCMR}, {&pitar, PITAR0}} {
		if *r.w, err = word(r.off); err != nil {
			return err
		}
	}
	cm := pocmr.Load()
	mask := cm & POCMRMask
	size := uint64(POCMRMask&^mask+1) << 12
	local := uint64(pobar.Load()&mask) << 12
	if cm&POCMREnable == 0 || cm&(POCMRIO|POCMRDst) != 0 || size&(size-1) != 0 {
		return b.bad(board.ErrInput, "outbound=%d: POCMR is %#x: it is not a memory window of the first PCI controller that is on; "+
			"have the boot loader turn one on, with a local access window, or leave engine= out", c.Outbound, cm)
	}
	b.out.local, b.out.size, b.out.was = local, size, b.out.potar.Load()
	target := uint64(pitar.Load()&pitarMask) << 12
	if a, z := local, local+size; a < target+window && target < z {
		return b.bad(board.ErrInput, "outbound=%d: it covers local addresses %#x to %#x, where the inbound window leads to", c.Outbound, a, z-1)
	}
	regs, err := immr.Mem(DMA, DMASize)
	if err != nil {
		return err
	}
	b.engines, err = fn.NewEngines(fn.EngineConfig{Spec: b.Spec, F: f, Make: fn.FSL83xx, Regs: regs, ToHost: c.Engine, ToBoard: c.Engine,
		WindowBus: target, Far: b.out.far, Idle: b.out.back, Mask: highest})
	if err != nil {
		return err
	}
	b.GoneF = b.engines.Gone(b.GoneF)
	return nil
}

// far lets the window lead to host memory, if it does not yet, and returns the local address of size bytes at a PCI address.
func (o *outbound) far(bus, size uint64) (uint64, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.ours {
		base := bus &^ (o.size - 1)
		o.potar.Store(uint32(base >> 12))
		if v := o.potar.Load(); v != uint32(base>>12) {
			return 0, fmt.Errorf("the outbound window does not take its set-up: POTAR is %#x, wanted %#x", v, base>>12)
		}
		o.base, o.ours = base, true
	}
	if bus < o.base || size > o.size || bus-o.base > o.size-size {
		return 0, fmt.Errorf("%#x bytes of memory at bus address %#x are outside of the outbound window of %#x bytes at %#x: have the boot loader make it larger",
			size, bus, o.size, o.base)
	}
	return o.local + bus - o.base, nil
}

// back lets the window lead to where it did.
func (o *outbound) back() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ours {
		o.ours = false
		o.potar.Store(o.was)
	}
}

// Engine implements board.Engined. Without channels for it (Config.Engine) there is none.
func (b *Board) Engine(c board.EngineConfig) (dma.Engine, dma.Span, error) {
	if b.engines == nil {
		return nil, dma.Span{}, fmt.Errorf("%s: %w (engine=CHANNELS gives it some)", b.Spec, board.ErrHasNoEngine)
	}
	return b.engines.Engine(c)
}
