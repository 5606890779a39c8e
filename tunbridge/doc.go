// Package tunbridge is the network end of a link: a tap or tun device, and the pump
// between it and a pair of virtqueues.
//
// In the room: Iface (open, configure, read and write a tap or tun device), the feature
// bits and the packet header of virtio-net as far as offload needs them, and the
// pump. Never in it: IP addresses and routes (cmd does that), the configuration space
// and the life cycle of a device model (host, agent), where memory lies.
//
// An Iface works in one of two modes, told apart by HeaderLen:
//
//   - vnet mode (12): every frame read or written starts with a virtio-net header in
//     little-endian (virtio 1.2, 5.1.6), so that checksums are left open and TCP
//     super-packets of up to 64 KiB cross the link whole. What the kernel may hand
//     over is what SetOffload allows, nothing by default.
//   - plain mode (0): every frame is complete, as on a wire.
package tunbridge
