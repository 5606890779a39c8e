// Package virtiomsg is the control plane of a link: the link page at the start of the
// window, the two FIFOs of 64-byte slots behind it, the virtio-msg messages that travel
// in them, and the epoch handshake that decides when the two sides may use each other's
// memory. docs/wire.md is the contract, byte by byte, with the argument why the handshake
// is safe; the names here are its names.
//
// In the room: the layout and its checks, the message codec, one side's Link, the matching
// of answers to requests. Never in it: rings, device models, doorbells (the Link only
// tells that the peer should be rung), goroutines, clocks, file descriptors.
//
// The messages follow the virtio-msg draft, RFC 3 (transport-msg.tex of 4 November 2025),
// of which we use the message formats, not its bus; conformance is not claimed.
//
// Everything that a peer writes is read once into a local and then checked. A Link, a
// Requests and a FIFO end belong to one goroutine at a time; nothing here allocates once a
// link is up.
package virtiomsg
