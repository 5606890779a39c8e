package vhostuser

import (
	"sync/atomic"

	"github.com/boardlink/boardlink/status"
)

// counters are a door's, over all its connections. They are updated with sync/atomic.
type counters struct {
	Connections       uint64 // front ends that connected
	Refused           uint64 // connections turned away, because there was one already
	Messages          uint64 // read whole
	Unknown           uint64 // requests that this back end does not know, or that were not negotiated
	Failed            uint64 // requests that could not be served
	DescriptorsClosed uint64 // descriptors that came with messages which want none
	DescriptorsStuck  uint64 // connections given up, as descriptors that came do not close
	Tables            uint64 // changes of the memory table
	TableRepeats      uint64 // regions added or removed once more than there are
	QueueStarts       uint64
	QueueStops        uint64
	QueuesBroken      uint64 // queues that ended because of what lay in them
	BaseResent        uint64 // queues that start before the base they are told, as some of their chains were never completed
	PlacesRecalled    uint64 // packed queues that go on at a place that was kept, as the front end does not know it
	Dropped           uint64 // chains of packed queues that were dropped, as the front end dropped what came after them
	PlacesLost        uint64 // packed queues in use that start from their beginning, as nobody knows their place
	Stuck             uint64 // stops of queues or changes of memory that took too long
	MemoryFaults      uint64 // accesses to memory that is gone
	Logs              uint64 // dirty logs that were taken
	LogChanges        uint64 // VHOST_F_LOG_ALL turned on or off while the features stayed
	LogOutside        uint64 // marks beyond the end of a dirty log that is not in use any more
	RARP              uint64 // announcements sent
	NoAcknowledge     uint64 // requests that failed without anybody to tell: their connections were closed
}

func (c *counters) load() map[string]uint64 {
	return status.Counters(counters{
		Connections:       atomic.LoadUint64(&c.Connections),
		Refused:           atomic.LoadUint64(&c.Refused),
		Messages:          atomic.LoadUint64(&c.Messages),
		Unknown:           atomic.LoadUint64(&c.Unknown),
		Failed:            atomic.LoadUint64(&c.Failed),
		DescriptorsClosed: atomic.LoadUint64(&c.DescriptorsClosed),
		DescriptorsStuck:  atomic.LoadUint64(&c.DescriptorsStuck),
		Tables:            atomic.LoadUint64(&c.Tables),
		TableRepeats:      atomic.LoadUint64(&c.TableRepeats),
		QueueStarts:       atomic.LoadUint64(&c.QueueStarts),
		QueueStops:        atomic.LoadUint64(&c.QueueStops),
		QueuesBroken:      atomic.LoadUint64(&c.QueuesBroken),
		BaseResent:        atomic.LoadUint64(&c.BaseResent),
		PlacesRecalled:    atomic.LoadUint64(&c.PlacesRecalled),
		Dropped:           atomic.LoadUint64(&c.Dropped),
		PlacesLost:        atomic.LoadUint64(&c.PlacesLost),
		Stuck:             atomic.LoadUint64(&c.Stuck),
		MemoryFaults:      atomic.LoadUint64(&c.MemoryFaults),
		Logs:              atomic.LoadUint64(&c.Logs),
		LogChanges:        atomic.LoadUint64(&c.LogChanges),
		LogOutside:        atomic.LoadUint64(&c.LogOutside),
		RARP:              atomic.LoadUint64(&c.RARP),
		NoAcknowledge:     atomic.LoadUint64(&c.NoAcknowledge),
	})
}
