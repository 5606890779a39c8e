package pci

import (
	"fmt"
	"runtime/debug"
	"sync"
)

// A BAR mapping can go away under a running program: the board is pulled, the kernel takes the mapping back
// when somebody turns the function's memory access off, a bus error comes back from a read. The processor
// then raises SIGBUS or SIGSEGV at the access, and Go ends the program. In a goroutine
// with debug.SetPanicOnFault the runtime panics instead, at that very access, which Guard turns
// into an error.

// guarded are the address ranges whose faults are a lost board and no defect of the program.
var (
	guardedMu sync.Mutex
	guarded   = map[uintptr]guardedRange{} // by start
)

type guardedRange struct {
	size uintptr
	name string
}

// GuardRange registers size bytes at base, mapped memory that may fault: a fault there ends
// the Guard it happens in with an error that names it. The implementations of Function call it for
// what they map. The result takes the range back; call it before the mapping goes.
func GuardRange(base uintptr, size uint64, name string) (release func()) {
	guardedMu.Lock()
	guarded[base] = guardedRange{uintptr(size), name}
	guardedMu.Unlock()
	return func() {
		guardedMu.Lock()
		delete(guarded, base)
		guardedMu.Unlock()
	}
}

func guardedName(addr uintptr) (string, bool) {
	guardedMu.Lock()
	defer guardedMu.Unlock()
	for base, r := range guarded {
		if addr >= base && addr-base < r.size {
			return r.name, true
		}
	}
	return "", false
}

// FaultError is a memory access that failed because the board behind it is lost. It matches ErrGone.
type FaultError struct {
	Name string // what was accessed: "0000:00:04.0 BAR 2"
	Addr uintptr
}

// Error names the mapping.
func (e *FaultError) Error() string {
	return fmt.Sprintf("pci function %s: the access at %#x failed: the board is gone, or its memory access was turned off", e.Name, e.Addr)
}

// Is tells whether target is ErrGone.
func (e *FaultError) Is(target error) bool { return target == ErrGone }

// Guard runs f and returns nil, or a *FaultError where an access to the mapping of a BAR faulted in this
// goroutine. Every other panic goes on.
//
// It costs nothing for each access: put it at the top of a goroutine that touches BARs, around its whole
// loop. What f held when it was torn out is in any state: locks are freed only by defer, rings and indices
// are not to be used again. That is what link loss means anyway: drop them and shake hands anew.
// A goroutine that f starts is not guarded; it needs a Guard of its own. Memory that is handed to a system call
// faults there with EFAULT, which never concerns a BAR: they are never handed to one.
func Guard(f func()) (err error) {
	old := debug.SetPanicOnFault(true)
	defer debug.SetPanicOnFault(old)
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		// runtime.Error of a fault has the address (Go 1.17 and later).
		if a, ok := r.(interface{ Addr() uintptr }); ok {
			if name, ok := guardedName(a.Addr()); ok {
				err = &FaultError{Name: name, Addr: a.Addr()}
				return
			}
		}
		panic(r)
	}()
	f()
	return nil
}
