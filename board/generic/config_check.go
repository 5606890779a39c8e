package generic

import (
	"fmt"
	"math/bits"

	"github.com/boardlink/boardlink/board/internal/fn"
	"github.com/boardlink/boardlink/dma/engine/dwedma"
	"github.com/boardlink/boardlink/dma/engine/fsl"
)

// Error names the key.
func (e *ConfigError) Error() string { return e.Key + ": " + e.Reason }

// MinWindow is the least size of a window, in bytes.
const MinWindow = 64 << 10

// maxVectors limits what a side can be rung by.
const maxVectors = 64

// poolAlign is what a pool's size is a multiple of: a page on every machine.
const poolAlign = 64 << 10

// Validate returns nil, or a *ConfigError that names the first invalid key.
func (c *Config) Validate() error {
	if errs := c.problems(); len(errs) > 0 {
		return errs[0]
	}
	return nil
}

// problems returns every invalid key, in the order of the checks.
func (c *Config) problems() (errs []*ConfigError) {
	if c.Host == nil && c.Agent == nil {
		return []*ConfigError{{"host", "neither [host] nor [agent] is there"}}
	}
	if c.Host != nil {
		v := validator{"host", true, &errs}
		v.side(&c.Host.Window, c.Host.Ring, c.Host.Interrupt, c.Host.Pool)
		if c.Host.Engine != nil {
			v.engine(c.Host.Engine, &c.Host.Window)
		}
	}
	if c.Agent != nil {
		v := validator{"agent", false, &errs}
		v.side(&c.Agent.Window, c.Agent.Ring, c.Agent.Interrupt, c.Agent.Pool)
	}
	if c.Host != nil && c.Agent != nil && len(errs) == 0 {
		errs = c.agree()
	}
	return errs
}

// agree compares the two sides.
func (c *Config) agree() (errs []*ConfigError) {
	bad := func(key, format string, args ...interface{}) {
		errs = append(errs, &ConfigError{key, fmt.Sprintf(format, args...)})
	}
	h, a := c.Host, c.Agent
	if h.Window.Size != 0 && h.Window.Size < a.Window.Size {
		bad("host.window.size", "%#x is less than the agent's, %#x", h.Window.Size, a.Window.Size)
	}
	if h.Window.BusAddress != 0 && h.Window.BusAddress != a.Window.bus() {
		bad("host.window.bus_address", "%#x is not the agent's, %#x", h.Window.BusAddress, a.Window.bus())
	}
	for _, p := range []struct {
		key  string
		ring *Ring
		irq  *Interrupt
	}{{"agent.ring.vectors", a.Ring, h.Interrupt}, {"host.ring.vectors", h.Ring, a.Interrupt}} {
		if p.ring == nil || p.irq == nil {
			continue
		}
		// The side that is rung declares its vectors; more than can be rung would refuse the link.
		if n := p.irq.vectors(); n > p.ring.vectors() {
			bad(p.key, "%d, but the side that is rung has %d: the same number here, or vectors of its interrupt", p.ring.vectors(), n)
		}
	}
	if p := h.Pool; p != nil && a.Pool != nil && a.Pool.Size < p.Size {
		bad("agent.pool.size", "%#x is less than the host's, %#x", a.Pool.Size, p.Size)
	}
	return errs
}

// validator collects what is wrong with one side.
type validator struct {
	name string
	host bool
	errs *[]*ConfigError
}

func (v validator) bad(key, format string, args ...interface{}) {
	key = v.name + "." + key
	for _, e := range *v.errs {
		if e.Key == key {
			return // what else is wrong with it follows from that
		}
	}
	*v.errs = append(*v.errs, &ConfigError{key, fmt.Sprintf(format, args...)})
}

func (v validator) side(w *Window, r *Ring, i *Interrupt, p *Pool) {
	v.window(w)
	if r != nil {
		v.ring(r)
	}
	if i != nil {
		v.interrupt(i)
	}
	if p != nil {
		v.pool(p)
	}
}

func (v validator) place(key string, p *Place) {
	if v.host {
		if p.Path != "" || p.Map != 0 {
			v.bad(key+".path", "the host has its memory in BARs: bar and offset")
		}
		if p.BAR < 0 || p.BAR > 5 {
			v.bad(key+".bar", "%d: BARs are 0 to 5", p.BAR)
		}
		return
	}
	if p.BAR != 0 {
		v.bad(key+".bar", "the agent has no BARs: path and offset")
	}
	if p.Map < 0 || p.Map > 255 {
		v.bad(key+".map", "%d: UIO maps are 0 to 255", p.Map)
	}
	if p.Offset > 1<<62 {
		v.bad(key+".offset", "%#x is not an address", p.Offset)
	}
}

func (v validator) window(w *Window) {
	v.place("window", &w.Place)
	if _, err := w.kind(v.host); err != nil {
		v.bad("window.memory", "%v", err)
	}
	min, max := w.access()
	if w.Offset&7 != 0 {
		v.bad("window.offset", "%#x is not a multiple of 8", w.Offset)
	}
	if w.Size == 0 && !v.host {
		v.bad("window.size", "is missing: a multiple of 0x1000 from %#x on", MinWindow)
	}
	if w.Size != 0 && (w.Size < MinWindow || w.Size&0xfff != 0 || w.Size > 1<<46) {
		v.bad("window.size", "%#x: a multiple of 0x1000 from %#x on is wanted", w.Size, MinWindow)
	}
	if w.BusAddress&0xfff != 0 {
		v.bad("window.bus_address", "%#x is not a multiple of 0x1000", w.BusAddress)
	}
	if !v.host && w.bus()&0x3f != 0 {
		v.bad("window.bus_address", "is missing, and the offset %#x is not a multiple of 64", w.Offset)
	}
	if w.Size != 0 && w.bus()+w.Size-1 < w.bus() {
		v.bad("window.bus_address", "%#x: the window would pass 2^64", w.bus())
	}
	if !isWidth(min) || !isWidth(max) {
		v.bad("window.min_access", "%d to %d bits: widths are 8, 16, 32 and 64", min, max)
	}
	if min > max || min > 32 {
		v.bad("window.min_access", "%d bits: at most 32, and max_access, %d", min, max)
	}
	if max < 16 {
		v.bad("window.max_access", "%d bits: a link needs 16 in one access, or its indices tear", max)
	}
	if (min != 8 || max != 64) && w.Memory == "cached" {
		v.bad("window.memory", "cached memory takes accesses of all widths")
	}
}

func isWidth(n uint) bool { return n == 8 || n == 16 || n == 32 || n == 64 }

// register tells whether the width makes sense, on which all else depends.
func (v validator) register(key string, r *Register) bool {
	v.place(key, &r.Place)
	w := r.width()
	if w != 8 && w != 16 && w != 32 {
		v.bad(key+".width", "%d bits: a register has 8, 16 or 32", w)
		return false
	}
	if r.Offset%uint64(w/8) != 0 {
		v.bad(key+".offset", "%#x is not a multiple of the register's %d bytes", r.Offset, w/8)
	}
	if r.Offset > 1<<62 {
		v.bad(key+".offset", "%#x lies in no BAR", r.Offset)
	}
	return true
}

func (r *Register) width() uint {
	if r.Width == 0 {
		return 32
	}
	return r.Width
}

// fits tells whether a value can stand in the register.
func (r *Register) fits(n uint64) bool { return n>>r.width() == 0 }

func (v validator) ring(r *Ring) {
	if !v.register("ring", &r.Register) {
		return
	}
	n := uint64(r.vectors())
	if n > maxVectors {
		v.bad("ring.vectors", "%d: at most %d", n, maxVectors)
	}
	if r.Stride%uint64(r.width()/8) != 0 || r.Stride > 1<<20 {
		v.bad("ring.stride", "%#x is not a multiple of the register's %d bytes, or more than 1 MiB", r.Stride, r.width()/8)
	}
	switch r.Write {
	case "bit":
		if uint64(r.Value)+n > uint64(r.width()) {
			v.bad("ring.vectors", "%d from bit %d on do not fit a register of %d bits", n, r.Value, r.width())
		}
	case "number":
		if !r.fits(uint64(r.Value) + n - 1) {
			v.bad("ring.value", "%#x+%d does not fit a register of %d bits", r.Value, n-1, r.width())
		}
	case "", "value":
		if !r.fits(uint64(r.Value)) {
			v.bad("ring.value", "%#x does not fit a register of %d bits", r.Value, r.width())
		}
		if n > 1 && r.Stride == 0 {
			v.bad("ring.write", "%d vectors in one register: bit or number is wanted", n)
		}
	default:
		v.bad("ring.write", "%q: bit, number or value is wanted", r.Write)
	}
}

func (r *Ring) vectors() uint32 {
	if r.Vectors == 0 {
		return 1
	}
	return r.Vectors
}

// value returns what is written for a vector, and where.
func (r *Ring) value(vec uint32) (v uint32, off uint64) {
	off = uint64(vec) * r.Stride
	switch r.Write {
	case "bit":
		return 1 << (r.Value + vec), off
	case "number":
		return r.Value + vec, off
	}
	return r.Value, off
}

func (v validator) interrupt(i *Interrupt) {
	if i.Vectors > maxVectors {
		v.bad("interrupt.vectors", "%d: at most %d", i.Vectors, maxVectors)
	}
	if v.host {
		switch i.Kind {
		case "", "any", "msix", "msi", "intx":
		default:
			v.bad("interrupt.kind", "%q: msix, msi, intx or any is wanted", i.Kind)
		}
		if i.Path != "" {
			v.bad("interrupt.path", "is for the agent")
		}
		if i.Kind == "intx" && i.Cause == nil {
			v.bad("interrupt.cause", "is missing: a level interrupt goes on until its cause is cleared")
		}
	} else {
		if i.Kind != "" {
			v.bad("interrupt.kind", "is for the host")
		}
		if i.Path == "" {
			v.bad("interrupt.path", "is missing: the UIO device, /dev/uioN")
		}
		if i.Cause == nil && i.Vectors > 1 {
			v.bad("interrupt.vectors", "%d, but one interrupt without a cause register is one", i.Vectors)
		}
	}
	if i.Cause != nil {
		v.cause(i)
	}
}

// vectors is how many doorbells a side with a cause register has; 0 where that depends on the function.
func (i *Interrupt) vectors() uint32 {
	if i.Cause == nil {
		return i.Vectors
	}
	n := uint32(bits.OnesCount32(i.Cause.Mask))
	if i.Vectors != 0 && i.Vectors < n {
		n = i.Vectors
	}
	return n
}

func (v validator) cause(i *Interrupt) {
	c := i.Cause
	if !v.register("interrupt.cause", &c.Register) {
		return
	}
	low := c.Mask >> uint(bits.TrailingZeros32(c.Mask))
	if c.Mask == 0 {
		v.bad("interrupt.cause.mask", "is missing: the bits that are doorbells")
	}
	if !c.fits(uint64(c.Mask)) {
		v.bad("interrupt.cause.mask", "%#x does not fit a register of %d bits", c.Mask, c.width())
	}
	if low&(low+1) != 0 {
		v.bad("interrupt.cause.mask", "%#x has gaps", c.Mask)
	}
	if i.Vectors > uint32(bits.OnesCount32(c.Mask)) {
		v.bad("interrupt.vectors", "%d, but the mask %#x has %d bits", i.Vectors, c.Mask, bits.OnesCount32(c.Mask))
	}
	if c.ClearOffset%uint64(c.width()/8) != 0 || c.ClearOffset > 1<<62 {
		v.bad("interrupt.cause.clear_offset", "%#x is not a multiple of the register's %d bytes", c.ClearOffset, c.width()/8)
	}
	switch c.Clear {
	case "", "ones", "zeros":
	case "read":
		if c.ClearOffset != 0 {
			v.bad("interrupt.cause.clear_offset", "reading the register itself clears")
		}
	default:
		v.bad("interrupt.cause.clear", "%q: ones, zeros or read is wanted", c.Clear)
	}
	if e := c.Enable; e != nil {
		if v.register("interrupt.cause.enable", &e.Register) && (e.Bits == 0 || !e.fits(uint64(e.Bits))) {
			v.bad("interrupt.cause.enable.bits", "%#x: bits of a register of %d bits are wanted", e.Bits, e.width())
		}
	}
}

func (v validator) pool(p *Pool) {
	v.place("pool", &p.Place)
	if p.Size == 0 || p.Size%poolAlign != 0 || p.Size > 1<<40 {
		v.bad("pool.size", "%#x: a multiple of %#x is wanted", p.Size, poolAlign)
	}
	if v.host && p.BusAddress != 0 {
		v.bad("pool.bus_address", "the host's follows from the DMA map; bus_offset is added to it")
	}
	if v.host && p.BusOffset&0xfff != 0 {
		v.bad("pool.bus_offset", "%#x is not a multiple of 0x1000", p.BusOffset)
	}
	if v.host && (p.BAR != 0 || p.Offset != 0) {
		v.bad("pool.bar", "the host's pool is its own memory")
	}
	if !v.host && (p.BusOffset != 0 || p.HighestAddress != 0) {
		v.bad("pool.bus_offset", "is for the host")
	}
	if !v.host && (p.BusAddress&0xfff != 0 || p.Offset&7 != 0) {
		v.bad("pool.bus_address", "%#x is not a multiple of 0x1000, or the offset %#x is not a multiple of 8", p.BusAddress, p.Offset)
	}
	if !v.host && p.BusAddress+p.Size-1 < p.BusAddress {
		v.bad("pool.bus_address", "%#x: the pool would pass 2^64", p.BusAddress)
	}
}

// engineChannels is how many channels of each direction a make has.
var engineChannels = map[string]int{string(fn.FSL83xx): fsl.MaxChannels, string(fn.FSL85xx): fsl.MaxChannels,
	string(fn.DWeDMA): dwedma.MaxChannels, string(fn.DWHDMA): dwedma.MaxChannels}

func (e *Engine) isDW() bool { return e.Kind == string(fn.DWeDMA) || e.Kind == string(fn.DWHDMA) }

// registers is how many bytes of registers the channels take.
func (e *Engine) registers() uint64 {
	n := 0
	for _, l := range [][]int{e.ToHost, e.ToBoard} {
		for _, c := range l {
			if c >= n {
				n = c + 1
			}
		}
	}
	switch fn.EngineMake(e.Kind) {
	case fn.DWeDMA:
		return dwedma.RegsSize(dwedma.EDMA, n)
	case fn.DWHDMA:
		return dwedma.RegsSize(dwedma.HDMA, n)
	}
	return uint64(n) * fsl.ChannelSize
}

func (v validator) engine(e *Engine, w *Window) {
	v.place("engine", &e.Place)
	n, ok := engineChannels[e.Kind]
	if !ok {
		v.bad("engine.kind", "%q: fsl83xx, fsl85xx, dw-edma or dw-hdma is wanted", e.Kind)
		return
	}
	for _, l := range []struct {
		key      string
		channels []int
	}{{"engine.to_host", e.ToHost}, {"engine.to_board", e.ToBoard}} {
		used := 0
		for _, c := range l.channels {
			if c < 0 || c >= n || used>>uint(c)&1 != 0 {
				v.bad(l.key, "channel %d: channels are 0 to %d, each once", c, n-1)
			}
			used |= 1 << uint(c)
		}
	}
	if len(e.ToHost)+len(e.ToBoard) == 0 {
		v.bad("engine.to_host", "is missing: the channels that the carrier may use, in to_host and to_board")
	}
	if e.Offset&7 != 0 || e.Offset > 1<<62 {
		v.bad("engine.offset", "%#x is not a multiple of 8", e.Offset)
	}
	if e.WindowAddress&0x3f != 0 {
		v.bad("engine.window_address", "%#x is not a multiple of 64", e.WindowAddress)
	}
	if e.WindowAddress == 0 && w.BusAddress == 0 {
		v.bad("engine.window_address", "is missing: the board's own address of the window (or host.window.bus_address)")
	}
	if e.BusOffset&0xfff != 0 {
		v.bad("engine.bus_offset", "%#x is not a multiple of 0x1000", e.BusOffset)
	}
	if e.Descriptors == nil && e.isDW() {
		v.bad("engine.descriptors", "is missing: a DesignWare controller has its lists in the board's memory")
	}
	d := e.Descriptors
	if d == nil {
		return
	}
	v.place("engine.descriptors", &d.Place)
	if d.Size == 0 || d.Size > 1<<20 || d.Offset&7 != 0 || d.Offset > 1<<62 || d.BusAddress&0x3f != 0 {
		v.bad("engine.descriptors", "size %#x, offset %#x, bus_address %#x: up to 1 MiB, a multiple of 8, and one of 64 are wanted", d.Size, d.Offset, d.BusAddress)
	}
}

func (w *Window) access() (min, max uint) {
	min, max = w.MinAccess, w.MaxAccess
	if min == 0 {
		min = 8
	}
	if max == 0 {
		max = 64
	}
	return min, max
}
