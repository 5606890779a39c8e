package msgdrv

import (
	"fmt"

	"github.com/boardlink/boardlink/virtiomsg"
)

// maxAsks bounds the requests of one Devices: an honest host needs at most one for each MaxDevices device numbers.
const maxAsks = 1<<16/virtiomsg.MaxDevices + 1

// Devices returns the numbers of the devices that the host offers, in order.
func Devices(l Link) ([]uint16, error) {
	var all []uint16
	var m virtiomsg.Slot
	for off, asks := uint16(0), 0; ; asks++ {
		if asks == maxAsks {
			return nil, fmt.Errorf("GET_DEVICES: %d answers, and the list of devices has not ended (next: %d)", asks, off)
		}
		first, n := off, uint16(virtiomsg.MaxDevices&^7)
		if rest := 1<<16 - int(off); rest < int(n) {
			n = uint16(rest)
		}
		err := l.Call(true, virtiomsg.BusGetDevices, 0, answerTime, &m, func(token uint16) {
			virtiomsg.EncodeGetDevices(&m, token, first, n)
		})
		if err != nil {
			return nil, err
		}
		var r virtiomsg.Devices
		if err := r.Decode(&m); err != nil {
			return nil, err
		}
		if r.Offset != off {
			return nil, fmt.Errorf("GET_DEVICES: the answer is about device %d and those behind it, %d was asked for", r.Offset, off)
		}
		for i := 0; i < int(r.Count); i++ {
			if n := off + uint16(i); r.Has(n) {
				all = append(all, n)
			}
		}
		if r.Next == 0 {
			return all, nil
		}
		if int(r.Next) < int(off)+int(r.Count) {
			return nil, fmt.Errorf("GET_DEVICES: goes on at device %d, which the answer from %d on has told of", r.Next, off)
		}
		off = r.Next
	}
}
