package netdev

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// errNoAck: a command whose chain has nothing that the device may write (virtio 1.2, 5.1.6.5): it cannot be answered.
var errNoAck = errors.New("a command without room for its acknowledgement")

// errStopped: the device stops.
var errStopped = errors.New("the device stops")

// Changes of the number of pairs take the kernel's lock of all network configuration, and a driver may ask for them without end:
// controlBurst of them at once, and one each controlPace in the long run.
const (
	controlPace  = 100 * time.Millisecond
	controlBurst = 8
)

// control serves the control queue of a network device: one command at a time, answered before the next is
// looked at.
type control struct {
	name     string
	q        vring.Device
	max      int             // pairs
	set      func(int) error // puts so many into use
	stop     *tunbridge.Stop
	wait     doorbell.Waiter
	call     doorbell.Ringer
	fallback doorbell.Fallback
	bells    *doorbell.Counters
	n        *controlCounters

	done chan struct{} // closed when its goroutine has ended; nil where none was started

	paced time.Time // when the whole burst is there again
	inUse int       // pairs, by the last change; 0: none yet

	answered bool // the last command
}

// startControl starts the goroutine that serves the control queue. It goes on with the pace of the one before. ops is held.
func (n *Net) startControl() error {
	stop, err := tunbridge.NewStop()
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	q := &n.ctrl
	c := &control{name: n.queueName(virtio.NetQueueCtrl(n.negotiated())), q: q.q, max: n.negotiated(), set: n.setPairs, stop: stop,
		wait: q.r.Kick, call: q.r.Call, fallback: n.cfg.Fallback, bells: q.bells, n: &n.ctl, done: make(chan struct{})}
	if old := n.control; old != nil {
		c.paced, c.inUse = old.paced, old.inUse
	}
	n.control = c
	index := virtio.NetQueueCtrl(n.negotiated())
	go func() {
		defer close(c.done)
		var err error
		if fault := pci.Guard(func() { err = c.Run() }); fault != nil {
			err = fault
		}
		if err == nil {
			return
		}
		n.mu.Lock()
		q.err = err
		n.mu.Unlock()
		n.tellBroken(index, err)
	}()
	return nil
}

// stopControl ends that goroutine. It wants ops, which its caller does not hold.
func (n *Net) stopControl(deadline time.Time) error {
	n.mu.Lock()
	c := n.control
	n.mu.Unlock()
	if c == nil || c.stop == nil {
		return nil
	}
	c.stop.Raise()
	if deadline.IsZero() {
		<-c.done
	} else {
		t := time.NewTimer(time.Until(deadline))
		defer t.Stop()
		select {
		case <-c.done:
		case <-t.C:
			return fmt.Errorf("%s: %w", c.name, device.ErrStuck)
		}
	}
	c.stop.Close()
	c.stop = nil
	return nil
}

// pauseControl ends the goroutine if queue i is the control queue.
func (n *Net) pauseControl(i int, deadline time.Time) error {
	n.mu.Lock()
	is := n.queue(i) == &n.ctrl
	n.mu.Unlock()
	if !is {
		return nil
	}
	return n.stopControl(deadline)
}

// controlCounters are updated with sync/atomic.
type controlCounters struct {
	ControlCommands uint64 // acknowledged with VIRTIO_NET_OK
	ControlRefused  uint64 // with VIRTIO_NET_ERR
}

func (c *controlCounters) load() controlCounters {
	return controlCounters{atomic.LoadUint64(&c.ControlCommands), atomic.LoadUint64(&c.ControlRefused)}
}

// Run serves the queue until stop is raised. A command that was not answered then is the driver's again.
func (c *control) Run() error {
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: c.wait, Stop: c.stop.Bell(), Fallback: c.fallback, Counters: c.bells})
	var b vring.Batch
	for !c.stop.Raised() {
		b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
		n, err := c.q.Pop(&b, 1)
		s.Found(n > 0)
		if n > 0 {
			if serr := c.serve(&b, &b.Chains[0]); serr != nil {
				c.q.Settle(nil, c.open())
				if serr == errStopped {
					return nil
				}
				return serr
			}
		}
		if err != nil {
			return err
		}
		if n > 0 {
			continue
		}
		if pending, err := c.q.ArmKick(); err != nil {
			return err
		} else if pending {
			continue
		}
		if _, err := s.Sleep(0); err != nil {
			return fmt.Errorf("%s: wait for the doorbell: %w", c.name, err)
		}
	}
	return nil
}

// open returns how many commands are popped and not answered.
func (c *control) open() int {
	if c.answered {
		return 0
	}
	return 1
}

// serve answers one command.
func (c *control) serve(b *vring.Batch, ch *vring.Chain) error {
	spans := b.Spans[ch.First:]
	c.answered = false
	if ch.Writable == 0 {
		return fmt.Errorf("%s: descriptor %d: %w", c.name, ch.ID, errNoAck)
	}
	ack := [1]byte{virtio.NetCtrlOK}
	if err := c.command(spans[:ch.Readable], ch.ReadLen); err == errStopped {
		return err
	} else if err != nil {
		ack[0] = virtio.NetCtrlErr
		atomic.AddUint64(&c.n.ControlRefused, 1)
	} else {
		atomic.AddUint64(&c.n.ControlCommands, 1)
	}
	spans[ch.Readable].CopyIn(0, ack[:])
	if err := c.q.Complete([]vring.Used{{ID: ch.ID, Count: ch.Count, Len: 1}}); err != nil {
		return err
	}
	c.answered = true
	if c.q.NeedCall() {
		// One that is lost is made good by the driver's polling; one that the driver made block is its fault.
		if err := c.call.Ring(); errors.Is(err, doorbell.ErrBlocked) {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return nil
}

// command carries out the command in the spans, length bytes in all. They are read once.
func (c *control) command(spans []dma.Span, length uint32) error {
	var cmd [virtio.NetCtrlPairsLen]byte
	have := uint32(0)
	for i := range spans {
		k := spans[i].Len
		if k > uint32(len(cmd))-have {
			k = uint32(len(cmd)) - have
		}
		spans[i].CopyOut(cmd[have:have+k], 0)
		if have += k; have == uint32(len(cmd)) {
			break
		}
	}
	pairs, err := virtio.DecodeNetCtrlPairs(cmd[:have], length, c.max)
	if err != nil || pairs == c.inUse {
		return err
	}
	now := time.Now()
	if c.paced.Before(now) {
		c.paced = now
	}
	if d := c.paced.Sub(now) - (controlBurst-1)*controlPace; d > 0 && c.stop.Wait(d) {
		return errStopped
	}
	c.paced = c.paced.Add(controlPace)
	if err := c.set(pairs); err != nil {
		return err
	}
	c.inUse = pairs
	return nil
}
