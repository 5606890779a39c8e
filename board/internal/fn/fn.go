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
)

// Arg is an argument "WHAT,key=value,key=value" in pieces.
type Arg struct {
	Spec string // whole, with the kind, for messages
	What string
	// DMAMask is the highest bus address that the function can reach by DMA; 0 is no limit.
	DMAMask uint64
	opts    map[string]string
}

// ParseArg takes an argument apart. Keys other than the given ones, and repeated ones, are errors
// that match board.ErrInput.
func ParseArg(kind, arg string, keys ...string) (Arg, error) {
	a := Arg{Spec: kind + ":" + arg, opts: map[string]string{}}
	parts := strings.Split(arg, ",")
	a.What = parts[0]
	for _, p := range parts[1:] {
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

// Open opens the PCI function a.What in the mode that the key "mode" names.
func (a Arg) Open(o board.Options) (pci.Function, error) {
	addr, err := pci.ParseAddress(a.What)
	if err != nil {
		return nil, Wrap(a.Spec, "its PCI address", err)
	}
	mode, err := a.OneOf("mode", "", string(pci.VFIO), string(pci.VFIONoIOMMU), string(pci.UIO), string(pci.SysfsOnly))
	if err != nil {
		return nil, err
	}
	// A board that was reset under us comes back with its BARs wiped.
	if done, err := (pci.Sysfs{}).Heal(addr); done != "" && o.Logf != nil {
		o.Logf("%s: the function had lost its configuration: %s", a.Spec, done)
	} else if errors.Is(err, pci.ErrGone) {
		return nil, Wrap(a.Spec, "cannot be opened", err)
	}
	f, err := pci.Open(addr, pci.Options{Mode: pci.Mode(mode), DMAMask: a.DMAMask, Logf: o.Logf})
	if err != nil {
		return nil, Wrap(a.Spec, "cannot be opened", err)
	}
	return f, nil
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
