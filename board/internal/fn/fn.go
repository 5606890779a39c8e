// Package fn is what the kinds of board that are PCI functions have in common: the argument of their spec, the
// opening of the function, its errors in the terms of package board, a register that rings.
//
// In the room: those. Never in it: what the registers of a kind are.
package fn

import (
	"errors"
	"fmt"
	"sort"
	"strings"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	_ "github.com/boardlink/boardlink/pci/uio"  // modes uio and sysfs
	_ "github.com/boardlink/boardlink/pci/vfio" // modes vfio and noiommu
	"github.com/boardlink/boardlink/status"
)

// Arg is an argument "WHAT,key=value,key=value" in pieces.
type Arg struct {
	Spec string // whole, with the kind, for messages
	What string
	// DMAMask is the highest bus address that the function can reach by DMA; 0 is no limit.
	DMAMask uint64
	// Interrupts is the only kind of interrupt that the board raises; the zero value takes the best that the
	// function has.
	Interrupts pci.InterruptKind
	// Match tells why a function is not a board of this kind, nil if it is one; Fits what is wrong with the
	// BARs of one. Both go by what sysfs tells. They may be nil.
	Match func(i *pci.Info) error
	Fits  func(i *pci.Info) []error
	opts  map[string]string
}

// ParseArg takes an argument apart. Keys other than the given ones, and repeated ones, are errors
// that match board.ErrInput.
func ParseArg(kind, arg string, keys ...string) (Arg, error) {
	parts := strings.Split(arg, ",")
	return parse(Arg{Spec: kind + ":" + arg, What: parts[0], opts: map[string]string{}}, parts[1:], keys)
}

// ParseKeys is ParseArg for an argument of options alone: "key=value,key=value". An empty one has none.
func ParseKeys(kind, arg string, keys ...string) (Arg, error) {
	var parts []string
	if arg != "" {
		parts = strings.Split(arg, ",")
	}
	return parse(Arg{Spec: kind + ":" + arg, opts: map[string]string{}}, parts, keys)
}

func parse(a Arg, parts, keys []string) (Arg, error) {
	for _, p := range parts {
		i := strings.IndexByte(p, '=')
		if i < 0 {
			return a, a.Bad("%q is not key=value; the keys are %s", p, strings.Join(keys, ", "))
		}
		k, known := p[:i], false
		for _, key := range keys {
			known = known || key == k
		}
		if !known {
			return a, a.Bad("there is no key %q; the keys are %s", k, strings.Join(keys, ", "))
		}
		if _, ok := a.opts[k]; ok {
			return a, a.Bad("the key %q comes twice", k)
		}
		a.opts[k] = p[i+1:]
	}
	return a, nil
}

// Get returns the value of a key, and whether it is there.
func (a Arg) Get(key string) (string, bool) {
	v, ok := a.opts[key]
	return v, ok
}

// Bad is an error of what the operator wrote.
func (a Arg) Bad(format string, args ...interface{}) error {
	return &board.Error{Spec: a.Spec, Reason: fmt.Sprintf(format, args...), Class: board.ErrInput}
}

// OneOf returns the value of a key, def where it is missing, and an error where it is none of the values.
func (a Arg) OneOf(key, def string, values ...string) (string, error) {
	v, ok := a.opts[key]
	if !ok {
		return def, nil
	}
	for _, x := range values {
		if v == x {
			return v, nil
		}
	}
	sort.Strings(values)
	return "", a.Bad("%s=%s: the values are %s", key, v, strings.Join(values, ", "))
}

// options are the address and the options by which the function is opened.
func (a Arg) options(o board.Options) (pci.Address, pci.Options, error) {
	addr, err := pci.ParseAddress(a.What)
	if err != nil {
		return addr, pci.Options{}, Wrap(a.Spec, "its PCI address", err)
	}
	mode, err := a.OneOf("mode", "", string(pci.VFIO), string(pci.VFIONoIOMMU), string(pci.UIO), string(pci.SysfsOnly))
	return addr, pci.Options{Mode: pci.Mode(mode), DMAMask: a.DMAMask, Interrupts: a.Interrupts, AllowSharedGroup: o.AllowSharedGroup, Logf: o.Logf}, err
}

// findings is what stands in the way of opening the function, as far as sysfs tells it: first of all that it
// is not a board of this kind, then that the kernel uses it.
func (a Arg) findings(i *pci.Info, o pci.Options) []error {
	if a.Match != nil {
		if err := a.Match(i); err != nil {
			return []error{err}
		}
	}
	var found []error
	for _, e := range o.Sysfs.Diagnose(i, o) {
		found = append(found, Wrap(a.Spec, "cannot be opened", e))
		if e.Problem == pci.InUse {
			return found
		}
	}
	if a.Fits != nil {
		found = append(found, a.Fits(i)...)
	}
	return found
}

// Examine is board.Kind's Examine: the findings that Open would refuse the function for, and what shows from
// outside only.
func (a Arg) Examine(o board.Options) []error {
	addr, opts, err := a.options(o)
	if err != nil {
		return []error{err}
	}
	i, err := opts.Sysfs.Read(addr)
	if err != nil {
		return []error{Wrap(a.Spec, "cannot be opened", err)}
	}
	found := a.findings(i, opts)
	if len(found) > 0 && (errors.Is(found[0], board.ErrInput) || isInUse(found[0])) {
		return found // what else there is to say concerns a board
	}
	for _, e := range opts.Sysfs.Suspect(i, opts) {
		found = append(found, Wrap(a.Spec, "cannot be opened", e))
	}
	return found
}

func isInUse(err error) bool {
	var e *pci.Error
	return errors.As(err, &e) && e.Problem == pci.InUse
}

// Open opens the PCI function a.What in the mode that the key "mode" names.
func (a Arg) Open(o board.Options) (pci.Function, error) {
	addr, opts, err := a.options(o)
	if err != nil {
		return nil, err
	}
	i, err := opts.Sysfs.Read(addr)
	if err != nil {
		return nil, Wrap(a.Spec, "cannot be opened", err)
	}
	// Nothing is done to a function that is none of ours.
	if found := a.findings(i, opts); len(found) > 0 && (errors.Is(found[0], board.ErrInput) || isInUse(found[0])) {
		return nil, found[0]
	}
	// A board that was reset under us comes back with its BARs wiped.
	if done, err := opts.Sysfs.Heal(addr); done != "" && o.Logf != nil {
		o.Logf("%s: the function had lost its configuration: %s", a.Spec, done)
	} else if errors.Is(err, pci.ErrGone) || errors.Is(err, pci.ErrAbsent) {
		return nil, Wrap(a.Spec, "cannot be opened", err)
	}
	if i, err = opts.Sysfs.Read(addr); err != nil {
		return nil, Wrap(a.Spec, "cannot be opened", err)
	}
	if found := a.findings(i, opts); len(found) > 0 {
		return nil, found[0]
	}
	f, err := pci.Open(addr, opts)
	if err != nil {
		return nil, Wrap(a.Spec, "cannot be opened", err)
	}
	if err := f.Gone(); err != nil { // a bridge above it may be off
		f.Close()
		return nil, Wrap(a.Spec, "cannot be opened", err)
	}
	return f, nil
}

// Bars looks at BARs of a function: that they have addresses, and, by check, at the size of each. check may be nil.
func Bars(spec string, i *pci.Info, check func(b pci.BAR) error, bars ...int) []error {
	var found []error
	for _, n := range bars {
		b, err := i.Usable(n)
		if err == nil && check != nil {
			err = check(b)
		}
		if err != nil {
			found = append(found, Wrap(spec, "cannot be used", err))
		}
	}
	return found
}

// Counters is board.Counting's method for a board with that function; nil is one without.
func Counters(f pci.Function) map[string]uint64 {
	if t, ok := f.(pci.CounterTeller); ok {
		return status.Counters(t.Counters())
	}
	return nil
}

// Warn tells the operator of a board that is open and that nothing confines.
func Warn(spec string, f pci.Function, o board.Options) {
	tell := o.Warnf
	if tell == nil {
		tell = o.Logf
	}
	if tell == nil || f.Mode() != pci.VFIONoIOMMU {
		return
	}
	if v, err := f.ReadConfig(pci.RegCommand, 2); err == nil && v&pci.CommandBusMaster != 0 {
		tell("%s: no IOMMU confines the board, and it masters the bus (for its interrupts): it can read and write all of this machine's memory; "+
			"with interrupts=off it does not master the bus", spec)
	}
}

// NoSuchBoard is the error for a function that is not a board of a kind; want tells what one is.
func NoSuchBoard(spec string, i *pci.Info, want string) error {
	reason := fmt.Sprintf("the function is %04x:%04x, which is no such board: %s", i.Vendor, i.Device, want)
	if i.Driver != "" && i.Driver != "vfio-pci" {
		reason += fmt.Sprintf("; the driver %s has it", i.Driver)
	}
	return &board.Error{Spec: spec, Reason: reason, Class: board.ErrInput}
}

// Wrap makes an error of package pci one of package board. A function that is not there, or not any
// more, is absent: it may come. One that another process has is a side that is taken.
func Wrap(spec, reason string, err error) error {
	if err == nil {
		return nil
	}
	var be *board.Error
	if errors.As(err, &be) {
		return err
	}
	e := &board.Error{Spec: spec, Reason: reason, Err: err}
	switch {
	case errors.Is(err, pci.ErrInput):
		e.Class = board.ErrInput
	case errors.Is(err, pci.ErrAbsent), errors.Is(err, pci.ErrGone):
		e.Class = board.ErrAbsent
	case errors.Is(err, pci.ErrBusy):
		e.Class = board.ErrSideTaken
	}
	return e
}

// Word is a register.
type Word struct {
	Mem   mmio.Mem
	Off   uint64 // of the register in Mem
	Width uint   // 8, 16, 32 bits
	Big   bool   // big-endian
}

// Load reads the register.
func (w *Word) Load() uint32 { return load(&w.Mem, w.Off, w.Width, w.Big) }

// Store writes the register.
func (w *Word) Store(v uint32) { store(&w.Mem, w.Off, w.Width, w.Big, v) }

// Reg rings by a store of one value to a register. It is a doorbell.Ringer.
type Reg struct {
	// Data is the memory whose stores have to be out before the ring.
	Data  mmio.Mem
	Word  Word
	Value uint32
}

// Ring stores the value, after everything stored before. It cannot fail: a posted write gives no answer.
func (r *Reg) Ring() error {
	order(&r.Data, &r.Word.Mem)
	r.Word.Store(r.Value)
	return nil
}

// order keeps a store to the register memory behind all stores to the data. The register's own
// barrier is a strong one, as it is device memory, and so holds for data of any kind; a modelled bus hears of
// both.
func order(data, reg *mmio.Mem) {
	if data.Modelled() || (data.Size() != 0 && reg.Kind() == mmio.Cached) {
		data.Barrier(mmio.WriteBarrier)
	}
	reg.Barrier(mmio.WriteBarrier)
}

// store stores the low width bits (8, 16, 32) of v.
func store(m *mmio.Mem, off uint64, width uint, big bool, v uint32) {
	switch width {
	case 8:
		m.Store8(off, uint8(v))
	case 16:
		if big {
			v = uint32(uint8(v))<<8 | uint32(uint8(v>>8))
		}
		m.Store16(off, uint16(v))
	default:
		if big {
			v = swap32(v)
		}
		m.Store32(off, v)
	}
}

// load loads width bits (8, 16, 32).
func load(m *mmio.Mem, off uint64, width uint, big bool) uint32 {
	switch width {
	case 8:
		return uint32(m.Load8(off))
	case 16:
		v := m.Load16(off)
		if big {
			v = v<<8 | v>>8
		}
		return uint32(v)
	}
	v := m.Load32(off)
	if big {
		v = swap32(v)
	}
	return v
}

func swap32(v uint32) uint32 {
	return v<<24 | v<<8&0xff0000 | v>>8&0xff00 | v>>24
}
