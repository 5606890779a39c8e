// Package loopback is a board made of shared memory: both ends of a link on one machine.
//
// The memory is a memfd, the doorbells are eventfds, and both are handed out by a rendezvous Server over
// the ivshmem client-server protocol (QEMU, docs/specs/ivshmem-spec.rst), so that the
// ivshmem-doorbell device of a QEMU guest can take the place of either end, and any ivshmem server that of
// ours. A board is opened by "loopback:PATH" with the server's socket, or by "loopback:fd=N" with
// an inherited socket that is connected to it (Server.Connect).
//
// In the room: the server, the client that is the board, one live process a side. Never in
// it: what the memory holds.
//
// # One process a side
//
// The protocol knows no sides, so each end locks one byte of the memory file, at the offset that is its
// side's number. It is a lock of the open file description (F_OFD_SETLK), on a description of its
// own (the memfd opened again through /proc/self/fd: what comes over the socket is shared with
// the server and all clients), and the memory is mapped through that very description. The mapping holds
// the description, so the kernel lets go of the lock when the last mapping is gone and no sooner:
// a free lock means that the process cannot write the memory any more. It also works between two ends in one process, and
// is not lost by closing some other descriptor of the file. Where /proc is missing, a
// lock of the process (F_SETLK) takes its place: it has neither property, and both ends
// of a link must then be in processes of their own.
package loopback
