// Package testboard is a board made of two private memories, the host's and the
// board's, joined by posted-write queues as PCI Express joins them. Coherent shared
// memory hides lost wake-ups, missing flushes and missing barriers; this board
// shows them.
//
// In the room: the memories, the bus between them and the processors in front of
// them; a scheduler that grants each access, barrier, delivery and sleep to exactly
// one processor, with a random and a systematic search over the schedules; a
// free-running pair of board.Board ends. Never in it: rings, messages, devices. They run
// on it unchanged, from tests, through mmio.Mem.
//
// # The bus
//
// The rules are those of the PCI Express Base Specification 4.0, table 2-39
// (ordering rules), with relaxed ordering off:
//
//   - A side reaches its own memory at once.
//   - A store to the other side's memory is posted: it enters a queue of its
//     direction and is delivered later, in order. Doorbells (a register write by
//     the host, an MSI by the board) are posted writes of the same queue, so they
//     arrive behind the data.
//   - A load across the bus is not posted: it pushes the reader's posted
//     writes ahead of it, and its completion does not pass the posted writes that the
//     other side queued before the load was served.
//
// # The processors
//
// A Proc is one processor (one goroutine) of a side. What a processor
// does to the order of its own accesses is set by Options:
//
//   - Stores to write-combining memory wait in the processor. Any later store may pass
//     them, up to the next strong write or full barrier. Strong barriers are those of a
//     Mem of kind Uncached or WriteCombining: a barrier of cached memory orders cached
//     accesses alone.
//   - With TSO all stores wait in a FIFO until a full barrier, so a load passes them
//     (x86). With Weak, stores that no barrier separates leave in any order (Arm,
//     PowerPC, RISC-V).
//   - With StaleLoads a load of local memory may return what stood there before
//     deliveries that came after the last read or full barrier: loads that
//     no barrier separates, executed out of order.
//
// Not modelled: a store that passes an earlier load of its own processor; bulk accesses
// (a Mem of this package has no RAM view); relaxed ordering and errors of the
// bus.
//
// # The search
//
// Explore runs a test many times, under random schedules and under all schedules
// that deviate from a few plain ones in at most a given number of places
// (delay-bounded search). All processors asleep with nothing under way while one of them
// is not done is a lost wake-up: it is reported with the accesses that led to it and with
// a line that replays it. There is no poll fallback in the model; it would hide them.
package testboard
