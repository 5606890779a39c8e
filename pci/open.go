package pci

import (
	"fmt"
	"sync"
)

// Opener opens functions in one or more modes.
type Opener func(a Address, o Options) (Function, error)

var (
	openersMu sync.Mutex
	openers   = map[Mode]Opener{}
)

// Register adds the way to open in a mode, from a sub-package's init. A mode that is empty or taken is a
// programmer's error and panics.
func Register(m Mode, open Opener) {
	openersMu.Lock()
	defer openersMu.Unlock()
	if m == Auto || open == nil || openers[m] != nil {
		panic(fmt.Sprintf("pci: mode %q is empty, has no opener, or is registered twice", m))
	}
	openers[m] = open
}

// Open opens a function in the given mode or, with Auto, in the one of the driver it is
// bound to. Errors are *Error as a rule. The modes are those of the imported sub-packages.
func Open(a Address, o Options) (Function, error) {
	m := o.Mode
	if m == Auto {
		info, err := o.Sysfs.Read(a)
		if err != nil {
			return nil, err
		}
		if m, err = AutoMode(info); err != nil {
			return nil, err
		}
	}
	openersMu.Lock()
	open := openers[m]
	openersMu.Unlock()
	if open == nil {
		return nil, &Error{
			Problem: BadInput, Spec: a.String(), Reason: fmt.Sprintf("cannot be opened as %q: there is no such mode", m),
			Mend: "the modes are vfio, noiommu, uio and sysfs",
		}
	}
	o.Mode = m
	return open(a, o)
}

// AutoMode is the mode that belongs to the driver a function is bound to. The error is an *Error
// with Problem Unbound where it has none, or one that is not for user space.
func AutoMode(i *Info) (Mode, error) {
	switch i.Driver {
	case "vfio-pci":
		if i.NoIOMMUGroup {
			return VFIONoIOMMU, nil
		}
		return VFIO, nil
	case "uio_pci_generic":
		return UIO, nil
	}
	return Auto, i.unbound("vfio-pci")
}

func (i *Info) unbound(driver string) *Error {
	e := &Error{Problem: Unbound, Spec: i.Address.String(), Mend: BindCommand(i, driver)}
	if i.Driver == "" {
		e.Reason = "is bound to no driver"
	} else {
		e.Reason = fmt.Sprintf("is bound to the driver %s, not to %s", i.Driver, driver)
	}
	return e
}

// NeedDriver returns nil where the function is bound to the driver, else an *Error that tells the command
// that binds it (Unbound), or that the driver is not loaded (MissingModule).
func (s Sysfs) NeedDriver(i *Info, driver string) error {
	if i.Driver == driver {
		return nil
	}
	e := i.unbound(driver)
	if !s.HasDriver(driver) {
		e.Problem = MissingModule
		e.Reason += ", and the kernel has no driver " + driver + " loaded"
		e.Mend = "modprobe " + driver + " && " + e.Mend
	}
	return e
}

// BindCommand is the shell command that binds the function to the driver.
func BindCommand(i *Info, driver string) string {
	dir := "/sys/bus/pci/devices/" + i.Address.String()
	s := "echo " + driver + " > " + dir + "/driver_override"
	if i.Driver != "" {
		s += "; echo " + i.Address.String() + " > " + dir + "/driver/unbind"
	}
	return s + "; echo " + i.Address.String() + " > /sys/bus/pci/drivers_probe"
}
