package netdev

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
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

	paced time.Time // when the whole burst is there again
	inUse int       // pairs, by the last change; 0: none yet
}

// controlCounters are updated with sync/atomic.
type controlCounters struct {
	ControlCommands uint64 // acknowledged with VIRTIO_NET_OK
	ControlRefused  uint64 // with VIRTIO_NET_ERR
}

func (c *controlCounters) load() controlCounters {
	return controlCounters{atomic.LoadUint64(&c.ControlCommands), atomic.LoadUint64(&c.ControlRefused)}
}

// Run implements tunbridge.Pump.
func (c *control) Run() error {
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: c.wait, Stop: c.stop.Bell(), Fallback: c.fallback, Counters: c.bells})
	var b vring.Batch
	for !c.stop.Raised() {
		b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
		n, err := c.q.Pop(&b, 1)
		s.Found(n > 0)
		if n > 0 {
			if serr := c.serve(&b, &b.Chains[0]); serr != nil {
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

// serve answers one command.
func (c *control) serve(b *vring.Batch, ch *vring.Chain) error {
	spans := b.Spans[ch.First:]
	if ch.Writable == 0 {
		return fmt.Errorf("%s: descriptor %d: %w", c.name, ch.ID, errNoAck)
	}
	ack := [1]byte{virtio.NetCtrlOK}
	if c.command(spans[:ch.Readable], ch.ReadLen) != nil {
		ack[0] = virtio.NetCtrlErr
		atomic.AddUint64(&c.n.ControlRefused, 1)
	} else {
		atomic.AddUint64(&c.n.ControlCommands, 1)
	}
	spans[ch.Readable].CopyIn(0, ack[:])
	if err := c.q.Complete([]vring.Used{{ID: ch.ID, Count: ch.Count, Len: 1}}); err != nil {
		return err
	}
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
		return errStopped // nobody is to see the answer any more
	}
	c.paced = c.paced.Add(controlPace)
	if err := c.set(pairs); err != nil {
		return err
	}
	c.inUse = pairs
	return nil
}
