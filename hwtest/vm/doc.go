// Package vm boots virtual machines for tests: QEMU in software emulation, with a kernel of
// Debian's and an initramfs that holds nothing but kernel modules, our own static programs and a first
// process (hwtest/guest/init) that does what the test asks for.
//
//	m, err := vm.Boot(ctx, vm.Carrier(vm.Ivshmem{ID: "b0", Socket: sock, Vectors: 4}))
//	defer m.Close()
//	out, err := m.Run(ctx, "/bin/boardlink", "probe", "--json")
//
// Nothing is stored in git: the kernels are Debian packages that apt fetches, and checks against Debian's
// keyring, into a cache (CacheDir) by a state of its own; the system's apt is left as it is.
//
// In the room: kernels, modules, the initramfs, QEMU's life, its monitor (QMP), the port to the guest, the
// standard machines. Never in it: testing.T (hwtest/vm/vmtest), what the tests test.
//
// # Rules of emulation, found the hard way
//
// A machine never has a single vCPU: QEMU would translate the guest's atomic
// instructions to plain loads and stores, and they would not hold towards processes outside of
// it. SMP 1 means one vCPU of two that could be (-smp 1,maxcpus=2), with the threaded
// translator. Emulated Arm reorders a store and a later load; and on an x86 host no emulation shows the
// weak order of other machines.
package vm

import (
	"errors"
	"fmt"
	"strings"
)

// MissingError says that this system lacks something a virtual machine needs. A test is skipped for it,
// but fails in CI.
type MissingError struct {
	// What is missing.
	What string
	// Mend is a command or an advice that mends it; may be empty.
	Mend string
	// Err is the cause; may be nil.
	Err error
}

// Error names what is missing, why, and what mends it.
func (e *MissingError) Error() string {
	s := e.What
	sep := " "
	if e.Err != nil {
		cause := e.Err.Error()
		if strings.Contains(cause, "\n") {
			sep = "\n"
		}
		if !strings.HasPrefix(cause, "\n") {
			cause = " " + cause
		}
		s += ":" + cause
	}
	if e.Mend != "" {
		s += sep + "(" + e.Mend + ")"
	}
	return s
}

// Unwrap returns the cause.
func (e *MissingError) Unwrap() error { return e.Err }

// IsMissing tells whether err says that this system lacks something.
func IsMissing(err error) bool {
	var m *MissingError
	return errors.As(err, &m)
}

// ErrTimeout is what an error matches whose cause is a guest that did not answer in time.
var ErrTimeout = errors.New("the guest did not answer in time")

// CrashError says that a machine ended by itself.
type CrashError struct {
	// Machine is Config.Name.
	Machine string
	// Reason is the kernel's line that names the crash, or how QEMU ended.
	Reason string
	// Console is the end of what the machine and QEMU printed.
	Console string
}

// Error is several lines: it shows the console.
func (e *CrashError) Error() string {
	return fmt.Sprintf("machine %s crashed: %s; its console:\n%s", e.Machine, e.Reason, e.Console)
}
