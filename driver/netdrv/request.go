package netdrv

import (
	"errors"
	"fmt"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// noAck is what stands in the acknowledgement until the device writes it (virtio 1.2, 5.1.6.5, has 0 and 1).
const noAck = 0xff

// answerTime is how long a command may take until the status tells of it.
const answerTime = 2 * time.Second

// request puts the queue pairs of a device that runs with one pair into use: a command on the control queue, and once
// the device has acknowledged it, the interface's queues. Until then, and if it does not, one pair goes on.
type request struct {
	n   *Net
	lay *bringUp
}

// Run implements tunbridge.Pump: it returns when the command is answered, or the device stops.
func (r *request) Run() error {
	l := r.lay
	q, name := l.ctrl.q, r.n.queueName(virtio.NetQueueCtrl(l.offers), l.offers)
	cmd, ack := virtio.EncodeNetCtrlPairs(uint16(l.count)), [1]byte{noAck}
	l.cmd.CopyIn(0, cmd[:])
	l.ack.CopyIn(0, ack[:])
	q.DisarmCall() // we poll
	if _, err := q.Add([]vring.Request{{Readable: 1, Bufs: []vring.Buffer{
		{Addr: l.cmd.Addr(), Len: uint32(len(cmd))}, {Addr: l.ack.Addr(), Len: uint32(len(ack))}}}}); err != nil {
		return err
	}
	if q.NeedKick() {
		// One that is lost is made good by the host's polling; one that the host made block is its fault.
		if err := l.kick.Ring(); errors.Is(err, doorbell.ErrBlocked) {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: l.call, Stop: l.stop.Bell(), Fallback: r.n.cfg.Fallback, Counters: l.ctrl.bells})
	began, told := time.Now(), false
	var done [1]vring.Completion
	for !l.stop.Raised() {
		n, err := q.Reap(done[:])
		s.Found(n > 0)
		if err != nil {
			return err
		}
		if n > 0 {
			l.ack.CopyOut(ack[:], 0)
			if ack[0] != virtio.NetCtrlOK {
				r.n.Failed(fmt.Errorf("%s: the host refuses %d queue pairs (acknowledgement %d): one is used", name, l.count, ack[0]))
				return nil
			}
			if told {
				r.n.Failed(nil)
			}
			return r.n.use(l.count)
		}
		if !told && time.Since(began) > answerTime {
			told = true
			r.n.Failed(fmt.Errorf("%s: the host does not answer: one queue pair is used, not %d", name, l.count))
		}
		if _, err := s.Sleep(0); err != nil {
			return fmt.Errorf("%s: wait for an answer: %w", name, err)
		}
	}
	return nil
}

// use lets the kernel send through the queues of so many pairs.
func (n *Net) use(pairs int) error {
	err := n.ifc.SetQueues(pairs)
	n.mu.Lock()
	n.inUse = n.ifc.InUse()
	n.mu.Unlock()
	return err
}
