// Package vhostuser is the vhost-user control plane over Unix sockets, both of its sides. A front
// end owns the memory and the rings, and drives a device that a back end serves. A Door is a back
// end: it serves a device.Device to front ends (a virtual machine monitor, a DPDK application). A
// Frontend runs a driver.Driver towards a back end (a switch, a DPDK application).
//
// It must not know boards, link pages, or virtio-msg.
//
// References are to "the specification": the vhost-user protocol, docs/interop/vhost-user.rst of
// QEMU.
//
// A Door is one socket with one device behind it. It has one connection at a time, and one
// goroutine (Door.serve) that makes every change; a second goroutine reads messages and hands them
// over one by one.
//
// A Frontend has one connection at a time, too, and the same two goroutines: Frontend.Run and
// backConn.read. It makes one request at a time and waits for its answer, which is never longer
// than FrontendConfig.Answer.
package vhostuser
