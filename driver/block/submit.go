package block

// Submit hands requests over. Those that cannot be sent now wait: for the device, for memory, or for an earlier request that they
// overlap; so the order of overlapping requests is that of Submit. A request that no disk could take, and one after Close, has
// ended when Submit returns. Any goroutine may call it, also from within Owner's methods.
func (d *Disk) Submit(reqs ...*Request) {
	o := outcomes.Get().(*outcome)
	d.mu.Lock()
	for _, r := range reqs {
		r.Err, r.dropped, r.blocks, r.blockers = r.check(), false, r.blocks[:0], 0
		if d.closed {
			r.Err = ErrClosed
		}
		if r.left = r.units(); r.Err != nil || r.left == 0 {
			if r.Err != nil {
				d.n.Errors++
			}
			o.done = append(o.done, r)
			continue
		}
		d.link(r)
		if r.blockers > 0 {
			d.n.Held++
			continue
		}
		d.todo.push(extent{r, 0, r.left})
	}
	d.dispatch(o)
	d.mu.Unlock()
	post(o.sends)
	for _, r := range o.done {
		r.Owner.Done(r)
	}
	o.reset()
	outcomes.Put(o)
}

// Cancel gives up the requests of an owner. What was not sent to the device ends with ErrCanceled before Cancel returns, or where it waits for an
// earlier request of somebody else, with that. What the device has is completed as usual, but it is not sent again when the host dies.
func (d *Disk) Cancel(owner Owner) {
	var o outcome
	d.mu.Lock()
	for r := d.first; r != nil; r = r.next {
		if r.Owner == owner {
			r.dropped = true
		}
	}
	d.dropWaiting(&o)
	d.dispatch(&o) // what has waited for them
	d.mu.Unlock()
	d.deliver(&o)
}

// dropWaiting ends what is given up and was not sent. d.mu is held.
func (d *Disk) dropWaiting(o *outcome) {
	for again := true; again; {
		again = false
		var gone []extent
		d.todo.remove(func(e *extent) bool {
			if e.r.dropped {
				gone = append(gone, *e)
			}
			return e.r.dropped
		})
		for _, e := range gone {
			d.settle(e.r, e.n, ErrCanceled, o) // may put more into todo
			again = true
		}
	}
}

// link appends r to the requests that have not ended, and finds those that it has to wait for. d.mu is held.
func (d *Disk) link(r *Request) {
	d.seq++
	r.seq = d.seq
	if r.Op.ranged() {
		for e := d.first; e != nil; e = e.next {
			if e.overlaps(r) {
				e.blocks = append(e.blocks, r)
				r.blockers++
			}
		}
	}
	r.prev, r.next = d.last, nil
	if d.last != nil {
		d.last.next = r
	} else {
		d.first = r
	}
	d.last = r
	d.count++
}

// unlink takes r out of the requests that have not ended. d.mu is held.
func (d *Disk) unlink(r *Request) {
	if r.prev != nil {
		r.prev.next = r.next
	} else {
		d.first = r.next
	}
	if r.next != nil {
		r.next.prev = r.prev
	} else {
		d.last = r.prev
	}
	r.prev, r.next = nil, nil
	d.count--
}

// settle notes that n units of r have ended, with err. d.mu is held.
func (d *Disk) settle(r *Request, n uint64, err error, o *outcome) {
	if r.Err == nil {
		r.Err = err
	}
	if r.left -= n; r.left > 0 {
		return
	}
	d.unlink(r)
	for i, b := range r.blocks {
		r.blocks[i] = nil
		if b.blockers--; b.blockers == 0 {
			d.todo.push(extent{b, 0, b.left})
		}
	}
	r.blocks = r.blocks[:0]
	d.tally(r)
	o.done = append(o.done, r)
}

// tally counts a request that has ended. d.mu is held.
func (d *Disk) tally(r *Request) {
	switch {
	case r.Op == GetID:
		return
	case r.Err == ErrCanceled:
		d.n.Canceled++
		return
	case r.Err != nil:
		d.n.Errors++
		return
	}
	switch r.Op {
	case Read:
		d.n.Reads++
		d.n.ReadBytes += r.Length
	case Write:
		d.n.Writes++
		d.n.WriteBytes += r.Length
	case Flush:
		d.n.Flushes++
	case Discard:
		d.n.Discards++
	case WriteZeroes:
		d.n.WriteZeroes++
	}
}

// refuse returns why the device cannot have r; nil if it can. d.mu is held, and the device is up.
func (l *limits) refuse(r *Request) error {
	switch {
	case r.Op.modifies() && l.ReadOnly:
		return ErrReadOnly
	case r.Op.ranged() && r.Offset+r.Length > l.Size:
		return ErrRange
	case r.Op == Discard && !l.Discard, r.Op == WriteZeroes && !l.WriteZeroes:
		return ErrUnsupported
	}
	return nil
}

// dispatch fills slots with what is to be done, in order, as long as there is room: the caller posts o.sends. d.mu is held.
func (d *Disk) dispatch(o *outcome) {
	s := d.up
	if s == nil {
		return
	}
	for d.todo.len() > 0 {
		e := d.todo.first()
		r := e.r
		err := r.Err // a part that failed spares the others
		if r.dropped {
			err = ErrCanceled
		}
		if err == nil {
			err = s.lim.refuse(r)
		}
		if err != nil || r.Op == Flush && !s.lim.Flush { // without a cache, what is completed is stable
			whole := *e
			d.todo.pop()
			d.settle(r, whole.n, err, o)
			continue
		}
		q := s.pick()
		if q == nil {
			return
		}
		part := slot{extent: extent{r, e.off, s.lim.partOf(r, e.n)}}
		if n := part.dataLen(); n > 0 {
			part.mem, part.pages = s.near, pagesFor(n)
			if r.Op == Write {
				part.mem = s.far
			}
			var ok bool
			if part.first, ok = part.mem.take(part.pages); !ok {
				return
			}
		}
		i := q.free[len(q.free)-1]
		q.free = q.free[:len(q.free)-1]
		q.slots[i] = part
		d.flight++
		d.n.Parts++
		o.sends = append(o.sends, send{q, i})
		if e.off += part.n; part.n == e.n {
			d.todo.pop()
		} else {
			e.n -= part.n
		}
	}
}

// partOf returns how many of n units of r go into one request.
func (l *limits) partOf(r *Request, n uint64) uint64 {
	most := n
	switch r.Op {
	case Read, Write:
		most = uint64(l.part)
	case Discard:
		most = l.discard
	case WriteZeroes:
		most = l.zeroes
	}
	if n > most {
		return most
	}
	return n
}

// pick returns the queue with the fewest requests in flight; nil if there is no room in any.
func (s *session) pick() *queue {
	var best *queue
	for _, q := range s.queues {
		if len(q.free) > 0 && (best == nil || len(q.free) > len(best.free)) {
			best = q
		}
	}
	return best
}

// ended takes q.results over, sends what has waited for that, and tells the owners. o and owners are the caller's scratch.
func (d *Disk) ended(q *queue, o *outcome, owners []Owner) []Owner {
	d.mu.Lock()
	for _, res := range q.results {
		s := &q.slots[res.slot]
		part := *s
		s.r = nil
		if part.mem != nil {
			part.mem.give(part.first, part.pages)
		}
		q.free = append(q.free, res.slot)
		d.flight--
		d.settle(part.r, part.n, res.err, o)
	}
	d.dispatch(o)
	d.mu.Unlock()
	owners = d.tell(o, owners)
	o.reset()
	return owners
}

// deliver does what is left to do of o, when d.mu was released.
func (d *Disk) deliver(o *outcome) { d.tell(o, nil) }

// tell posts what is to be sent and tells the owners of what has ended. owners is scratch, which it returns.
func (d *Disk) tell(o *outcome, owners []Owner) []Owner {
	post(o.sends)
	owners = owners[:0]
	for _, r := range o.done {
		w := r.Owner
		w.Done(r)
		known := false
		for _, x := range owners {
			known = known || x == w
		}
		if !known {
			owners = append(owners, w)
		}
	}
	for i, w := range owners {
		w.Flush()
		owners[i] = nil
	}
	return owners
}
