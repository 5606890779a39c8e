// Package scan finds the PCI functions of a machine and names them for people: vendor, device and class
// by the tables of github.com/u-root/u-root/pkg/pci, all else by package pci's own reader.
//
// In the room: lists for probe and doctor. Never in it: opening functions. It is for cmd alone: u-root wants
// a current Go, and the tables are over a megabyte.
//
// What u-root's reader does not survive (as of v0.16.0) is kept from it: on 32-bit machines a BAR above
// 4 GiB makes it give up the whole bus, so it is asked for one function at a time; and a
// configuration space that is cut short makes Read panic, so that is left to package pci.
package scan

import (
	"errors"
	"fmt"
	"strings"
	"unicode"

	upci "github.com/u-root/u-root/pkg/pci"

	"github.com/boardlink/boardlink/pci"
)

// Function is what there is to know about a function without opening it. Names are the numbers in
// hexadecimal where the tables have none.
type Function struct {
	*pci.Info
	VendorName string
	DeviceName string
	ClassName  string
}

// String returns "0000:00:04.0 Memory RAM: Red Hat, Inc. Inter-VM shared memory".
func (f Function) String() string {
	return fmt.Sprintf("%s %s: %s %s", f.Address, f.ClassName, f.VendorName, f.DeviceName)
}

// All returns every function of the machine, by address. One that cannot be read is left out and named in
// the error, beside the others: look at both results. One that vanishes meanwhile is left out.
func All(s pci.Sysfs) ([]Function, error) {
	as, err := s.Functions()
	if err != nil {
		return nil, err
	}
	var fs []Function
	var errs []error
	for _, a := range as {
		f, err := One(s, a)
		switch {
		case err == nil:
			fs = append(fs, f)
		case !errors.Is(err, pci.ErrAbsent):
			errs = append(errs, err)
		}
	}
	return fs, errors.Join(errs...)
}

// One returns one function. The error is an *pci.Error.
func One(s pci.Sysfs, a pci.Address) (Function, error) {
	info, err := s.Read(a)
	if err != nil {
		return Function{}, err
	}
	f := Function{Info: info}
	if p, err := upci.OnePCI(s.Dir(a)); err == nil {
		p.SetVendorDeviceName(upci.IDs)
		f.VendorName, f.DeviceName, f.ClassName = p.VendorName, p.DeviceName, p.ClassName
	} else {
		f.VendorName, f.DeviceName = upci.Lookup(upci.IDs, info.Vendor, info.Device)
		f.ClassName = upci.ClassNames[info.Class]
	}
	if f.ClassName == "" || f.ClassName == "ClassUnknown" {
		f.ClassName = className(info.Class)
	}
	f.ClassName = words(f.ClassName)
	return f, nil
}

// words sets the words of a class name apart, which u-root's table runs together: "SystemPCIHotplug" becomes
// "System PCI Hotplug". A capital begins a word behind a small letter, and before one.
func words(name string) string {
	var b strings.Builder
	for i, r := range name {
		if i > 0 && !unicode.IsLower(r) && r != ' ' {
			last := rune(name[i-1])
			small := i+1 < len(name) && unicode.IsLower(rune(name[i+1]))
			if unicode.IsLower(last) || unicode.IsUpper(last) && unicode.IsUpper(r) && small {
				b.WriteByte(' ')
			}
		}
		b.WriteRune(r)
	}
	return b.String()
}

// className finds the name of the subclass or, failing that, of the class, where the programming interface
// has none of its own. u-root's keys are the 24 bits, but for the classes, which are 8.
func className(class uint32) string {
	for _, c := range []uint32{class &^ 0xff, class >> 16} {
		if n := upci.ClassNames[c]; n != "" {
			return n
		}
	}
	return fmt.Sprintf("class %06x", class)
}
