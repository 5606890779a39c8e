// Package host is the carrier's program: one Link a board, the device models behind
// it, their life cycle.
//
// In the room: device models (Net) behind the device.Device interface, which is all that a control
// plane sees of them; the Link, which serves virtio-msg to the agent and takes devices up and down
// with the link. Never in it: flags, printing, exit codes (cmd/), how a board is reached
// (board/), what messages look like (virtiomsg/), rings (vring/).
package host
