// Package vring is the virtqueues: driver side and device side of the split ring
// and of the packed ring (virtio 1.2, 2.7 and 2.8), in batches.
//
// In the room: rings in memory, their indices, the suppression of notifications, the
// checks of everything that a peer wrote. Never in it: a device, a file descriptor, a
// doorbell, who mapped the memory.
//
// A queue belongs to one goroutine at a time; only Stats, State and Broken may be used
// by others. The loop of a device side:
//
//	for {
//		q.DisarmKick()
//		for {
//			n, err := q.Pop(&batch, 64) // an error breaks the queue for good
//			if n == 0 {
//				break
//			}
//			... move the payload ...
//			q.Complete(used)
//			if q.NeedCall() {
//				... ring ...
//			}
//		}
//		pending, err := q.ArmKick()
//		if !pending {
//			... sleep until kicked ...
//		}
//	}
//
// and that of a driver side is the same with Add, NeedKick, Reap, ArmCall and DisarmCall.
//
// What a peer may do wrong is an *Error with a Code of its own; it breaks the queue and
// is counted. Nothing a peer writes makes a queue panic, loop for long, allocate
// without bound, or touch memory outside its areas and the region table.
package vring
