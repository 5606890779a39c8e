// Package msgdrv reaches a virtio device over virtio-msg: it is a driver.Transport that turns each request of a driver
// into a message to the host, and waits for the answer.
//
// It must not know boards, link pages, or what a driver is for.
package msgdrv

import (
	"fmt"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
)

// answerTime limits the wait for an answer of the host.
const answerTime = 2 * time.Second

// Link is what carries the messages: one end of a link, on the board.
type Link interface {
	// Call sends a request and waits for its answer, for timeout at most. encode writes the request with the token
	// it is given into the slot, which then receives the answer.
	Call(bus bool, id uint8, dev uint16, timeout time.Duration, m *virtiomsg.Slot, encode func(token uint16)) error
	// Kick returns what rings the host for a queue of device dev, Called the end of this side's doorbell for it.
	Kick(dev uint16, queue int) doorbell.Ringer
	Called(dev uint16, queue int) doorbell.Waiter
}

// Transport is one device of a link. It belongs to the link's goroutine.
type Transport struct {
	l    Link
	dev  uint16
	name string // for errors
	m    virtiomsg.Slot
	gen  uint32 // of the configuration as read last
}

var _ driver.Transport = (*Transport)(nil)

// New returns the transport to device number dev; name is for errors.
func New(l Link, dev uint16, name string) *Transport { return &Transport{l: l, dev: dev, name: name} }

func (t *Transport) call(id uint8, encode func(token uint16)) error {
	if err := t.l.Call(false, id, t.dev, answerTime, &t.m, encode); err != nil {
		return fmt.Errorf("%s: %w", t.name, err)
	}
	return nil
}

// Exists tells whether the host offers the device.
func (t *Transport) Exists() (bool, error) {
	err := t.l.Call(true, virtiomsg.BusGetDevices, 0, answerTime, &t.m, func(token uint16) {
		virtiomsg.EncodeGetDevices(&t.m, token, t.dev&^7, 8)
	})
	if err != nil {
		return false, fmt.Errorf("%s: %w", t.name, err)
	}
	var r virtiomsg.Devices
	if err := r.Decode(&t.m); err != nil {
		return false, err
	}
	return r.Has(t.dev), nil
}

// ID returns the virtio device id of the device.
func (t *Transport) ID() (uint32, error) {
	if err := t.call(virtiomsg.GetDeviceInfo, func(token uint16) { virtiomsg.EncodeGetDeviceInfo(&t.m, t.dev, token) }); err != nil {
		return 0, err
	}
	var r virtiomsg.DeviceInfo
	if err := r.Decode(&t.m); err != nil {
		return 0, err
	}
	return r.DeviceID, nil
}

// Check reports a device that has another virtio device id.
func (t *Transport) Check(id uint32) error {
	got, err := t.ID()
	if err == nil && got != id {
		err = fmt.Errorf("%s: device %d of the host has virtio device id %d, not %d", t.name, t.dev, got, id)
	}
	return err
}

// Features implements driver.Transport.
func (t *Transport) Features() (virtio.Features, error) {
	err := t.call(virtiomsg.GetDeviceFeatures, func(token uint16) {
		virtiomsg.EncodeGetDeviceFeatures(&t.m, t.dev, token, 0, virtio.FeatureBlocks)
	})
	if err != nil {
		return virtio.Features{}, err
	}
	var b virtiomsg.FeatureBlocks
	if err := b.DecodeResponse(&t.m); err != nil {
		return virtio.Features{}, err
	}
	var f virtio.Features
	if err := b.Store(&f); err != nil {
		return virtio.Features{}, fmt.Errorf("%s: features: %w", t.name, err)
	}
	return f, nil
}

// SetFeatures implements driver.Transport.
func (t *Transport) SetFeatures(f virtio.Features) error {
	b := virtiomsg.BlocksOf(f, 0, virtio.FeatureBlocks)
	err := t.call(virtiomsg.SetDriverFeatures, func(token uint16) { b.EncodeRequest(&t.m, t.dev, token) })
	if err != nil {
		return err
	}
	return virtiomsg.DecodeEmptyResponse(&t.m, virtiomsg.SetDriverFeatures)
}

// Config implements driver.Transport.
func (t *Transport) Config(off, n uint32) ([]byte, error) {
	if n > virtiomsg.ConfigChunk {
		return nil, fmt.Errorf("%s: %d bytes of configuration at once, at most %d go", t.name, n, virtiomsg.ConfigChunk)
	}
	err := t.call(virtiomsg.GetConfig, func(token uint16) { virtiomsg.EncodeGetConfig(&t.m, t.dev, token, off, n) })
	if err != nil {
		return nil, err
	}
	var r virtiomsg.ConfigData
	if err := r.DecodeResponse(&t.m, virtiomsg.GetConfig); err != nil {
		return nil, err
	}
	if r.Offset != off || r.Len != n {
		return nil, fmt.Errorf("%s: the host gives %d bytes of configuration at %d, %d at %d were asked for", t.name, r.Len, r.Offset, n, off)
	}
	t.gen = r.Generation
	return append([]byte(nil), r.Data[:n]...), nil
}

// WriteConfig implements driver.Transport.
func (t *Transport) WriteConfig(off uint32, b []byte) error {
	if len(b) < 1 || len(b) > virtiomsg.ConfigChunk {
		return fmt.Errorf("%s: a write of %d bytes of configuration: 1 to %d go at once", t.name, len(b), virtiomsg.ConfigChunk)
	}
	c := virtiomsg.ConfigData{Generation: t.gen, Offset: off, Len: uint32(len(b))}
	copy(c.Data[:], b)
	if err := t.call(virtiomsg.SetConfig, func(token uint16) { c.EncodeRequest(&t.m, t.dev, token) }); err != nil {
		return err
	}
	var r virtiomsg.ConfigData
	if err := r.DecodeResponse(&t.m, virtiomsg.SetConfig); err != nil {
		return err
	}
	if r.Len != c.Len || r.Offset != off {
		return fmt.Errorf("%s: the device refuses a write of %d bytes of configuration at %d", t.name, c.Len, off)
	}
	return nil
}

// SetStatus implements driver.Transport.
func (t *Transport) SetStatus(s uint32) (uint32, error) {
	err := t.call(virtiomsg.SetDeviceStatus, func(token uint16) { virtiomsg.EncodeSetDeviceStatus(&t.m, t.dev, token, s) })
	if err != nil {
		return 0, err
	}
	return virtiomsg.DecodeStatus(&t.m, virtiomsg.SetDeviceStatus)
}

// QueueMax implements driver.Transport.
func (t *Transport) QueueMax(i int) (uint16, error) {
	err := t.call(virtiomsg.GetVQueue, func(token uint16) {
		virtiomsg.EncodeQueueRequest(&t.m, virtiomsg.GetVQueue, t.dev, token, uint32(i))
	})
	if err != nil {
		return 0, err
	}
	var q virtiomsg.VQueue
	if err := q.DecodeResponse(&t.m); err != nil {
		return 0, err
	}
	if q.MaxSize > 1<<15 {
		return 1 << 15, nil
	}
	return uint16(q.MaxSize), nil
}

// SetQueue implements driver.Transport.
func (t *Transport) SetQueue(i int, size uint16, desc, driverArea, device dma.Addr) error {
	q := virtiomsg.VQueue{Index: uint32(i), Size: uint32(size), Desc: uint64(desc), Driver: uint64(driverArea), Device: uint64(device)}
	err := t.call(virtiomsg.SetVQueue, func(token uint16) { q.EncodeRequest(&t.m, t.dev, token) })
	if err != nil {
		return err
	}
	return virtiomsg.DecodeEmptyResponse(&t.m, virtiomsg.SetVQueue)
}

// Kick implements driver.Transport.
func (t *Transport) Kick(i int) doorbell.Ringer {
	return t.l.Kick(t.dev, i)
}

// Call implements driver.Transport.
func (t *Transport) Call(i int) doorbell.Waiter {
	return t.l.Called(t.dev, i)
}
