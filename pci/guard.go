package pci

import (
	"fmt"
	"reflect"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"

	"github.com/boardlink/boardlink/mmio"
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
	size   uintptr
	name   string
	shared bool // memory of a file
}

// GuardRange registers size bytes at base, mapped memory that may fault: a fault there ends
// the Guard it happens in with an error that names it. The implementations of Function call it for
// what they map. The result takes the range back; call it before the mapping goes.
func GuardRange(base uintptr, size uint64, name string) (release func()) {
	return guardRange(base, guardedRange{size: uintptr(size), name: name})
}

// GuardShared is GuardRange for memory of a file that other processes share: it faults where somebody
// truncates the file. A system call that is given such memory fails with EFAULT instead.
func GuardShared(base uintptr, size uint64, name string) (release func()) {
	return guardRange(base, guardedRange{size: uintptr(size), name: name, shared: true})
}

func guardRange(base uintptr, r guardedRange) (release func()) {
	guardedMu.Lock()
	guarded[base] = r
	guardedMu.Unlock()
	return func() {
		guardedMu.Lock()
		delete(guarded, base)
		guardedMu.Unlock()
	}
}

func guardedAt(addr uintptr) (guardedRange, bool) {
	guardedMu.Lock()
	defer guardedMu.Unlock()
	for base, r := range guarded {
		if addr >= base && addr-base < r.size {
			return r, true
		}
	}
	return guardedRange{}, false
}

// FaultError is a memory access that failed because the board behind it is lost. It matches ErrGone.
type FaultError struct {
	Name string  // what was accessed: "0000:00:04.0 BAR 2"
	Addr uintptr // in this process; 0 where the processor did not tell
	// Shared: the memory is that of a shared file (GuardShared).
	Shared bool
}

// Error names the mapping.
func (e *FaultError) Error() string {
	if e.Shared {
		return fmt.Sprintf("%s: the access at %#x to the shared memory failed: somebody truncated its file", e.Name, e.Addr)
	}
	if e.Addr == 0 {
		return fmt.Sprintf("pci function %s: an access failed: the board is gone, or its memory access was turned off", e.Name)
	}
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
// faults there with EFAULT, which never concerns a BAR: they are never handed to one. (Shared
// memory is: see GuardShared.)
func Guard(f func()) (err error) {
	old := debug.SetPanicOnFault(true)
	defer debug.SetPanicOnFault(old)
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		if fe := boardFault(r); fe != nil {
			err = fe
			return
		}
		panic(r)
	}()
	f()
	return nil
}

// boardFault tells from what was recovered, in the deferred function itself, whether it is the fault of a
// board; nil where it is not.
func boardFault(r interface{}) *FaultError {
	re, ok := r.(runtime.Error)
	if !ok {
		return nil
	}
	addr := uintptr(0)
	if a, ok := re.(interface{ Addr() uintptr }); ok { // Go 1.17
		if addr = a.Addr(); addr != 0 {
			if r, ok := guardedAt(addr); ok {
				return &FaultError{Name: r.name, Addr: addr, Shared: r.shared}
			}
		}
	}
	// Some processors do not tell the address of the data: none, or that of the instruction (a machine
	// check on PowerPC). Then it is a board's if package mmio was at work, which touches nothing else.
	frame, ok := faulting()
	if !ok || !strings.HasPrefix(frame.Function, mmioPrefix) {
		return nil
	}
	if addr == 0 || addr-frame.Entry < 4096 {
		return &FaultError{Name: "(unknown)"}
	}
	return nil
}

// mmioPrefix is what the names of package mmio's functions start with.
var mmioPrefix = strings.TrimSuffix(runtime.FuncForPC(reflect.ValueOf(mmio.Stronger).Pointer()).Name(), "Stronger")

// faulting finds the function whose access the signal interrupted.
func faulting() (runtime.Frame, bool) {
	var pcs [64]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(0, pcs[:])])
	signal := false
	for {
		f, more := frames.Next()
		if signal && !strings.HasPrefix(f.Function, "runtime.") {
			return f, true
		}
		signal = signal || f.Function == "runtime.sigpanic"
		if !more {
			return runtime.Frame{}, false
		}
	}
}
