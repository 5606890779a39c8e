// Package agent is the board's program: it lays out the board's memory, drives the virtio devices that
// the host offers, and bridges them to interfaces of its own.
//
// In the room: the Link (handshake, bring-up, life cycle) and the drivers (Net). Never in it:
// flags, printing, exit codes (cmd/), how a board is reached (board/), what messages look like
// (virtiomsg/), rings (vring/).
package agent
