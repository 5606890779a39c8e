// Package frames sends and receives network frames over a virtqueue without a network interface: for programs that make or
// take their packets themselves.
//
// In the room: the four ends (driver and device side, sending and receiving) in batches, a pair of queues in shared
// memory, where frames lie in it, the virtio-net header, what is checked of a peer, and what calls a program's Handler. Never in it:
// interfaces, rings of its own, the life cycle of a device (host, agent).
//
// Every frame has a virtio-net header of 12 bytes in front (virtio 1.2, 5.1.6), as in package tunbridge: one end may be
// here, the other a pump. No offload is used: frames are complete, as on a wire.
//
// A sender:
//
//	for {
//		out, err := s.Reserve(64) // room in the memory of the ring; none: s.Wait()
//		for i := range out {
//			out[i].Len = fill(out[i].Room)
//		}
//		err = s.Send(len(out)) // one write of the index, at most one doorbell
//	}
//
// A receiver:
//
//	for {
//		in, err := r.Receive(64) // none: r.Wait()
//		for _, frame := range in {
//			take(frame)
//		}
//		err = r.Done() // the buffers go back: one write of the index, at most one doorbell
//	}
//
// Where the memory is cached, rooms and frames lie in it: nothing is copied here. Across a bus, and in memory that is no RAM,
// they are copies in private memory. No frame costs an allocation, a lock, or a call through an interface: the queue is called
// once a batch.
//
// Over a board, device/framedev is the host's device and driver/framedrv the agent's driver whose frames go to a Handler; the
// program in examples/frames uses both. Either may have a tap interface of the other side for its peer.
//
// Shared makes both ends of a link of two queues over memory that two programs share, Connect over memory of one program. A program
// that has its own queues makes the four ends one by one.
//
// An end belongs to one goroutine at a time, and so does its queue. Only the Stats may be read by others.
package frames
