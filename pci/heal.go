package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
)

// Heal brings a function back whose board was reset under us: vendor id and device id answer, the BARs and memory decoding are
// wiped. It writes the BARs that the kernel had assigned, with memory decoding; where that does not hold it removes the
// function, rescans the bus and gives it back to its driver. It returns what it did, "" where nothing was
// wrong, and the error of Check where the function cannot be helped; one that matches ErrAbsent where there is none. The
// function must not be open.
func (s Sysfs) Heal(a Address) (done string, err error) {
	if !s.Present(a) {
		return "", absent(a)
	}
	err = s.Check(a)
	var e *Error
	if err == nil || !errors.As(err, &e) || e.Problem != Wiped {
		return "", err
	}
	i, err := s.Read(a)
	if err != nil {
		return "", err
	}
	if !wipedBARs(i) {
		return "", nil // memory access is off, no more: whoever opens the function turns it on
	}
	driver := i.Driver
	// Elsewhere addresses on the bus need not be the processor's, which are all that the kernel tells.
	if runtime.GOARCH == "amd64" || runtime.GOARCH == "386" {
		if err = s.restoreBARs(i); err == nil && s.Check(a) == nil {
			return "its BARs were written again", nil
		}
	}
	if err := s.Remove(a); err != nil {
		return "", err
	}
	if err := s.Rescan(); err != nil {
		return "", err
	}
	if err := s.Check(a); err != nil {
		return "", err
	}
	if driver != "" {
		if err := s.Bind(a, driver); err != nil {
			return "", err
		}
	}
	return "it was removed, and found again by a rescan", nil
}

// wipedBARs tells whether a register of a memory BAR that has an address holds none.
func wipedBARs(i *Info) bool {
	for _, b := range i.BARs {
		off := RegBAR0 + 4*b.Index
		if b.Unassigned || b.IO || b.Index >= NumBARs || b.Start == 0 || off+8 > len(i.Config) {
			continue
		}
		r := uint64(binary.LittleEndian.Uint32(i.Config[off:]) &^ 0xf)
		if b.Bits64 && b.Index+1 < NumBARs {
			r |= uint64(binary.LittleEndian.Uint32(i.Config[off+4:])) << 32
		}
		if r == 0 {
			return true
		}
	}
	return false
}

// restoreBARs writes the base address registers (PCI 3.0, 6.2.5.1) and turns decoding on.
func (s Sysfs) restoreBARs(i *Info) error {
	f, err := os.OpenFile(filepath.Join(s.Dir(i.Address), "config"), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("pci function %s: restore its BARs: %w", i.Address, err)
	}
	defer f.Close()
	var b [4]byte
	put := func(off int64, v uint32) {
		if err == nil {
			binary.LittleEndian.PutUint32(b[:], v)
			_, err = f.WriteAt(b[:], off)
		}
	}
	command := uint32(0)
	for _, bar := range i.BARs {
		if bar.Unassigned || bar.Index >= NumBARs {
			continue
		}
		off := int64(RegBAR0 + 4*bar.Index)
		put(off, uint32(bar.Start)) // the low bits are read-only
		if bar.Bits64 {
			put(off+4, uint32(bar.Start>>32))
		}
		if bar.IO {
			command |= CommandIO
		} else {
			command |= CommandMemory
		}
	}
	if err == nil {
		var c [2]byte
		if _, err = f.ReadAt(c[:], RegCommand); err == nil {
			binary.LittleEndian.PutUint16(c[:], binary.LittleEndian.Uint16(c[:])|uint16(command))
			_, err = f.WriteAt(c[:], RegCommand)
		}
	}
	if err != nil {
		return fmt.Errorf("pci function %s: restore its BARs: %w", i.Address, err)
	}
	return nil
}
