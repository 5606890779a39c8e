// Package doorbell rings and is rung: what stands in the place of a virtual machine's kick and
// call eventfds.
//
// In the room: Ringer and Waiter and their kinds (eventfd here; register write,
// MSI through VFIO and UIO read as boards need them), sleeping with a poll fallback, the
// counters. Never in it: rings, devices, what the notification means.
package doorbell
