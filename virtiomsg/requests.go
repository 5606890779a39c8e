package virtiomsg

// MaxRequests is how many requests of one side may wait for their answers at a time.
const MaxRequests = 32

type pending struct {
	token uint16 // 0: free
	id    uint8
	bus   bool
	dev   uint16
}

// Requests matches answers to requests, at the side that asks. It knows no time: the caller
// cancels what takes too long. The zero value is ready for use. It belongs to one goroutine.
type Requests struct {
	// Stale counts answers that belong to no waiting request: late ones, of a request that was
	// cancelled or sent on an earlier incarnation of the link, and wrong ones.
	Stale uint64

	last uint16
	wait [MaxRequests]pending
	n    int
}

// Begin allocates the token, not 0, of a request with the given id: of the bus, or to device dev.
// It fails with ErrTooMany. A token comes back into use last of all, so that a late answer does
// not meet a new request.
func (r *Requests) Begin(bus bool, id uint8, dev uint16) (token uint16, err error) {
	if r.n == MaxRequests {
		return 0, ErrTooMany
	}
	for {
		r.last++
		if r.last != 0 && r.find(r.last) < 0 {
			break
		}
	}
	i := r.find(0)
	r.wait[i] = pending{token: r.last, id: id, bus: bus, dev: dev}
	r.n++
	return r.last, nil
}

func (r *Requests) find(token uint16) int {
	for i := range r.wait {
		if r.wait[i].token == token {
			return i
		}
	}
	return -1
}

// Match tells whether a response answers a waiting request: the same token, message and device.
// That request waits no longer. Otherwise the response is counted in Stale and is to be
// dropped.
func (r *Requests) Match(h Header) bool {
	if h.Response() && h.Token != 0 {
		if i := r.find(h.Token); i >= 0 {
			p := &r.wait[i]
			if p.id == h.ID && p.bus == h.Bus() && p.dev == h.Dev {
				*p = pending{}
				r.n--
				return true
			}
		}
	}
	r.Stale++
	return false
}

// Cancel gives a request up, and tells whether it was waiting. An answer that still comes is stale.
func (r *Requests) Cancel(token uint16) bool {
	if token == 0 {
		return false
	}
	i := r.find(token)
	if i < 0 {
		return false
	}
	r.wait[i] = pending{}
	r.n--
	return true
}

// Reset gives all requests up and returns how many there were: the link went down.
func (r *Requests) Reset() int {
	n := r.n
	r.wait = [MaxRequests]pending{}
	r.n = 0
	return n
}
