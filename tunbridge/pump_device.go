package tunbridge

import "github.com/boardlink/boardlink/vring"

// DeviceTX writes the frames that the driver sent to the interface: the device side
// of a transmit queue.
type DeviceTX struct {
	common
	q    vring.Device
	b    vring.Batch
	next int          // first chain in b that is neither written, nor dropped, nor in flight
	used []vring.Used // what was written or dropped, and is not completed
	fly  *txFlight    // nil without a Mover
}

var _, _ DevicePump = (*DeviceTX)(nil), (*DeviceRX)(nil)

// NewDeviceTX returns the pump of a transmit queue.
func NewDeviceTX(c PumpConfig, q vring.Device) *DeviceTX {
	p := &DeviceTX{common: newCommon(c), q: q, used: make([]vring.Used, 0, batchFrames)}
	if p.mover != nil {
		p.fly = newTXFlight(p.stage, p.max)
	}
	return p
}

// Run implements Pump. Frames in flight have landed when it returns, and what did not go out was given back to the ring's state.
func (p *DeviceTX) Run() error { return alone(p) }

func (p *DeviceTX) begin() error {
	p.q.DisarmKick()
	return nil
}

// ground lets all that is in flight land. What has not gone out is popped again by whoever goes on.
func (p *DeviceTX) ground() {
	rest := len(p.b.Chains) - p.next + p.landAll()
	p.b, p.next = vring.Batch{}, 0
	p.settle(p.q, &p.used, rest)
}

func (p *DeviceTX) change(c Change) {
	if c.Queue != nil {
		p.q = c.Queue
	}
	p.common.change(c)
}

func (p *DeviceTX) step(turn) (result, error) {
	ring, err := p.drain()
	return p.wrote(ring), err
}

func (p *DeviceTX) arm() (a arming, err error) {
	a.pending, err = p.q.ArmKick()
	return a, err
}

func (p *DeviceTX) disarm() { p.q.DisarmKick() }

// drain moves one batch and returns the number of its frames.
func (p *DeviceTX) drain() (int, error) {
	if p.fly != nil {
		return p.drainMoved()
	}
	return p.direct(p.pop(batchFrames))
}

// pop takes at most max chains from the ring.
func (p *DeviceTX) pop(max int) (int, error) {
	p.b.Chains, p.b.Spans, p.next = p.b.Chains[:0], p.b.Spans[:0], 0
	return p.q.Pop(&p.b, max)
}

// direct writes the frames of n chains that were popped, before the ring broke where qerr is not nil.
func (p *DeviceTX) direct(n int, qerr error) (int, error) {
	bytes := 0
	for p.next < n {
		c := &p.b.Chains[p.next]
		if err := p.frame(c); err != nil {
			return p.next, err
		}
		p.used = append(p.used, vring.Used{ID: c.ID, Count: c.Count})
		p.next++
		if bytes += int(c.ReadLen); bytes >= batchBytes && qerr == nil {
			// Do not let the driver run dry while a large batch goes out.
			if err := p.complete(); err != nil {
				return p.next, err
			}
			bytes = 0
		}
	}
	if qerr != nil {
		return n, qerr // ground completes them
	}
	return n, p.complete()
}

func (p *DeviceTX) complete() error {
	if len(p.used) == 0 {
		return nil
	}
	if err := p.q.Complete(p.used); err != nil {
		return err
	}
	p.used = p.used[:0]
	p.d[cBatches]++
	var err error
	if p.q.NeedCall() {
		err = p.ring()
	}
	p.stats.flush(&p.d)
	return err
}

// frame writes the frame of one chain. The device side makes no assumption about how it is cut
// into buffers (virtio 1.2, 2.7.4.1).
func (p *DeviceTX) frame(c *vring.Chain) error {
	total := int(c.ReadLen)
	if p.muted || !p.passes(total) {
		return nil // give the buffer back
	}
	spans := p.b.Spans[c.First : int(c.First)+int(c.Readable)]
	p.iov = p.iov[:0]
	// The header is read once into local memory; the payload goes from the ring
	// buffers straight into the kernel, which takes its own copy before it looks. More pieces than the
	// kernel takes in one call are put together first.
	need := 0
	direct := len(spans) < maxIOV
	for i := range spans {
		if need < HeaderLen {
			k := int(spans[i].Len)
			if k > HeaderLen-need {
				k = HeaderLen - need
			}
			spans[i].CopyOut(p.hdr[need:need+k], 0)
			need += k
		}
		direct = direct && isRAM(&spans[i])
	}
	p.hdr.forInterface()
	switch {
	case p.vnet:
		p.addIov(&p.hdr[0], HeaderLen)
	case !p.hdr.plain():
		p.d[cBadHeader]++
		return nil
	}
	skip := uint32(HeaderLen)
	n := 0
	for i := range spans {
		s := &spans[i]
		if skip >= s.Len {
			skip -= s.Len
			continue
		}
		if direct {
			p.addSpan(s, skip, int(s.Len-skip))
			s.AccountIovecRead(uint64(s.Len - skip))
		} else {
			rest := s.Sub(skip, s.Len-skip)
			rest.CopyOut(p.staging[n:n+int(rest.Len)], 0)
			n += int(rest.Len)
		}
		skip = 0
	}
	if !direct {
		p.addIov(&p.staging[0], n)
		p.d[cStaged]++
	}
	return p.write(total - HeaderLen)
}

// settle ends a batch of q: what was used is completed, the other rest chains are given back. It works on a broken queue too; one that
// refuses even that has an owner who broke it.
func (c *common) settle(q vring.Device, used *[]vring.Used, rest int) {
	if len(*used) == 0 && rest == 0 {
		return
	}
	u := *used
	*used = u[:0] // first: where a fault of the memory ends Settle, nothing is completed twice
	call, err := q.Settle(u, rest)
	if err == nil && len(u) > 0 {
		c.d[cBatches]++
	}
	if call {
		c.ring() // a peer that blocks it is found out by the next one
	}
}
