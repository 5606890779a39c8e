package pci

import (
	"errors"
)

// Problem is what stands between the program and a function.
type Problem uint8

// The problems. Each has a mending command of its own in Error.Mend, where there is one.
const (
	// Other is none of the following: Error.Err tells.
	Other Problem = iota
	// BadInput: what the operator wrote is not valid.
	BadInput
	// Absent: there is no such function (now).
	Absent
	// Gone: the function was there and is not any more: unplugged, or the bus answers all-ones.
	Gone
	// Wiped: the function is there but was reset under us: its BARs or its memory access are off.
	Wiped
	// InUse: a driver of the kernel uses it: it is a disk, a network interface, ...
	InUse
	// Unbound: no driver, or the wrong one, is bound to it.
	Unbound
	// MissingModule: the kernel has no driver of the wanted name loaded.
	MissingModule
	// NoIOMMU: the function is in no IOMMU group.
	NoIOMMU
	// NoIOMMUDisabled: the kernel could open it without an IOMMU, but was not told to.
	NoIOMMUDisabled
	// Busy: another process has it open.
	Busy
	// GroupShared: another function of its IOMMU group is in use by a driver of the kernel, or by this
	// program.
	GroupShared
	// Permission: this process may not.
	Permission
	// Memlock: the limit of locked memory is too low for what is to be mapped for DMA.
	Memlock
	// NoBAR: the BAR does not exist, was given no address, or cannot be mapped.
	NoBAR
	// NoInterrupt: the function, or this way of opening it, has no such interrupts.
	NoInterrupt
	// NoDMA: this way of opening the function cannot map memory for it.
	NoDMA
	// NoReset: the kernel knows no way to reset the function.
	NoReset
)

var problemNames = [...]string{
	"other", "bad-input", "absent", "gone", "wiped", "in-use", "unbound", "missing-module", "no-iommu", "noiommu-disabled",
	"busy", "group-shared", "permission", "memlock", "no-bar", "no-interrupt", "no-dma", "no-reset",
}

// String returns a word for status and JSON: "group-shared".
func (p Problem) String() string {
	if int(p) < len(problemNames) {
		return problemNames[p]
	}
	return "problem"
}

// What errors of this package and its sub-packages match (errors.Is).
var (
	// ErrInput: the operator's input is at fault.
	ErrInput = errors.New("pci: bad input")
	// ErrAbsent: the function is not there, and may yet come.
	ErrAbsent = errors.New("pci: absent")
	// ErrGone: the function was lost while open: unplugged, reset under us, or its mapping faults.
	ErrGone = errors.New("pci: gone")
	// ErrBusy: another process has the function.
	ErrBusy = errors.New("pci: busy")
	// ErrUnsupported: this way of opening the function cannot do it (DMA without an IOMMU,
	// interrupts without a driver).
	ErrUnsupported = errors.New("pci: unsupported")
	// ErrClosed: the function was closed.
	ErrClosed = errors.New("pci: function is closed")
)

// Error is why something about a function cannot be done, in one line, with the command that
// mends it.
type Error struct {
	Problem Problem
	Spec    string // "0000:00:04.0"
	Reason  string // what is wrong; follows Spec and a colon
	Mend    string // what to do about it, a command as a rule; may be empty
	Err     error  // the cause below, an errno as a rule; may be nil
}

// Error returns the line.
func (e *Error) Error() string {
	s := "pci function " + e.Spec + ": " + e.Reason
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if e.Mend != "" {
		s += " (" + e.Mend + ")"
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is tells whether target is the class of the problem: ErrInput, ErrAbsent, ErrGone, ErrBusy, ErrUnsupported.
func (e *Error) Is(target error) bool {
	switch e.Problem {
	case BadInput:
		return target == ErrInput
	case Absent:
		return target == ErrAbsent
	case Gone, Wiped:
		return target == ErrGone
	case Busy:
		return target == ErrBusy
	case NoInterrupt, NoDMA, NoReset, NoIOMMU:
		return target == ErrUnsupported
	}
	return false
}

// UserError tells that the user's input or the machine's set-up is at fault, not the
// program: one line that says what to do, and exit status 2.
func (e *Error) UserError() bool {
	switch e.Problem {
	case Other, Gone, Wiped:
		return false
	}
	return true
}
