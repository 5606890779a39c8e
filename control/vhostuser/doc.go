// Package vhostuser is the vhost-user control plane: it serves a device.Device to a front end (a
// virtual machine monitor, a DPDK application) over a Unix socket. The front end owns the memory
// and the rings; this side is the back end.
//
// It must not know boards, link pages, or virtio-msg.
//
// References are to "the specification": the vhost-user protocol, docs/interop/vhost-user.rst of
// QEMU.
//
// A Door is one socket with one device behind it. It has one connection at a time, and one
// goroutine (Door.serve) that makes every change; a second goroutine reads messages and hands them
// over one by one.
package vhostuser
