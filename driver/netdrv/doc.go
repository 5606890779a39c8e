// Package netdrv is the virtio-net driver: it lays out the queues of a device's pairs, and joins them to a tap or tun
// interface.
//
// It must not know messages, sockets, boards, or what carries its requests.
package netdrv
