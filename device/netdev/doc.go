// Package netdev is the virtio-net device model: queue pairs on one side, a tap or tun interface on the other, and the
// control queue between them.
//
// It must not know messages, sockets, boards, or who serves it.
package netdev
