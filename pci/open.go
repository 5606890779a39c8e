package pci

import (
	"fmt"
	"sync"
)

// Opener opens functions in one or more modes. i is what sysfs tells of the function, which Diagnose found
// nothing against; o.Mode is not Auto.
type Opener func(i *Info, o Options) (Function, error)

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
// bound to. It refuses what Diagnose tells of. Errors are *Error as a rule. The modes are those of the
// imported sub-packages.
func Open(a Address, o Options) (Function, error) {
	openersMu.Lock()
	open := openers[o.Mode]
	openersMu.Unlock()
	if open == nil && o.Mode != Auto {
		return nil, &Error{
			Problem: BadInput, Spec: a.String(), Reason: fmt.Sprintf("cannot be opened as %q: there is no such mode", o.Mode),
			Mend: "the modes are vfio, noiommu, uio and sysfs",
		}
	}
	i, err := o.Sysfs.Read(a)
	if err != nil {
		return nil, err
	}
	if found := o.Sysfs.Diagnose(i, o); len(found) > 0 {
		return nil, found[0]
	}
	if o.Mode == Auto {
		if o.Mode, err = o.Sysfs.AutoMode(i); err != nil {
			return nil, err
		}
		openersMu.Lock()
		open = openers[o.Mode]
		openersMu.Unlock()
		if open == nil {
			return nil, &Error{Problem: BadInput, Spec: a.String(), Reason: fmt.Sprintf("this program has no mode %s", o.Mode)}
		}
	}
	return open(i, o)
}

// AutoMode is the mode that belongs to the driver a function is bound to. The error is an *Error, what
// Diagnose tells of one that has none, or one that is not for user space.
func (s Sysfs) AutoMode(i *Info) (Mode, error) {
	switch i.Driver {
	case driverVFIO:
		if i.NoIOMMUGroup {
			return VFIONoIOMMU, nil
		}
		return VFIO, nil
	case driverUIO:
		return UIO, nil
	}
	if e := s.inUse(i); e != nil {
		return Auto, e
	}
	if e := s.vfioDriver(i); e != nil {
		return Auto, e
	}
	return Auto, &Error{Problem: Unbound, Spec: i.Address.String(), Reason: boundTo(i, driverVFIO)}
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
