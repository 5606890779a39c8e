// Package vring is the virtqueues: driver side and device side of the split ring
// (virtio 1.2, 2.7), the packed ring later, in batches.
//
// In the room: rings in memory, their indices, the suppression of notifications, the
// checks of everything that a peer wrote. Never in it: a device, a file descriptor, a
// doorbell, who mapped the memory.
//
// A queue belongs to one goroutine at a time; only Stats and State may be read
// by others.
package vring
