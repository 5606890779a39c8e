package app

import (
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/session"
)

// deviceTypes are the types of device that links can have, in the order of device numbers. A new one takes a folder (or
// one below device and one below driver) and a line here.
var deviceTypes = []DeviceType{
	{Name: "net", Plan: planNets},
	{Name: "console", First: consoleNumber, Class: doorbell.Control, Plan: planConsoles},
	{Name: "entropy", First: rngNumber, Class: doorbell.Bulk, Plan: planRngs},
	{Name: "block", First: diskNumber, Class: doorbell.Bulk, Plan: planDisks},
}

// DeviceType is a type of device. Both ends of a link know it.
type DeviceType struct {
	Name string
	// First is the device number of the first device of this type on a link; 0: they follow those of the types before.
	First uint16
	// Class is that of devices of this type where the operator chose none (see classed).
	Class doorbell.Class
	// Plan returns the devices of this type that a configuration asks for on board number b, in the order of their
	// device numbers, which has to be the same on both ends. It opens nothing. An error is one line for the user.
	Plan func(c *Config, b int, log session.Logger) ([]Plan, error)
}

// Plan is a device as it is to be made. Where that fails it may be tried again.
type Plan interface {
	// Model makes the device of a host, with its device number on the link, and opens what it is joined to; Driver is
	// the same on an agent. After an error nothing is left open.
	Model(number uint16) (device.Device, error)
	Driver(number uint16) (driver.Driver, error)
}

// classOf returns the class of a device of this type.
func (t *DeviceType) classOf(p Plan) doorbell.Class {
	if p, ok := p.(classed); ok {
		if c, chosen := p.class(); chosen {
			return c
		}
	}
	return t.Class
}

// classed is a Plan whose class an operator may choose; chosen: one did.
type classed interface {
	class() (c doorbell.Class, chosen bool)
}

// keeper is a Plan whose device, once it is made, is looked after while its link runs. lost hears that what it is joined to is gone for
// good; nil: that is tried again for ever.
type keeper interface {
	keep(lost func(error)) (stop func())
}
