package session

import (
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtiomsg"
)

func (s *Session) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = ""
	if err != nil {
		s.last = err.Error()
	}
}

// Status returns what the session knows of the link. Any goroutine may call it.
func (s *Session) Status() status.Link {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := status.Link{Name: s.cfg.Name, Board: s.cfg.Spec, State: s.state.String(), Reason: s.why, Since: s.since.Format(time.RFC3339Nano),
		Epoch: s.epochs[0], PeerEpoch: s.epochs[1], LastError: s.last, Regions: []status.Region{}}
	l.Counters = status.Counters(Counters{Opened: atomic.LoadUint64(&s.n.Opened), OpenErrors: atomic.LoadUint64(&s.n.OpenErrors), RingErrors: atomic.LoadUint64(&s.n.RingErrors),
		Malformed: atomic.LoadUint64(&s.n.Malformed), Unexpected: atomic.LoadUint64(&s.n.Unexpected), CallTimeout: atomic.LoadUint64(&s.n.CallTimeout),
		Floods: atomic.LoadUint64(&s.n.Floods), Stuck: atomic.LoadUint64(&s.n.Stuck), NoRoom: atomic.LoadUint64(&s.n.NoRoom), Throttled: atomic.LoadUint64(&s.n.Throttled),
		Merged: atomic.LoadUint64(&s.n.Merged), Backoffs: atomic.LoadUint64(&s.n.Backoffs), Illegal: atomic.LoadUint64(&s.n.Illegal)})
	for k, v := range status.Counters(s.bells.Snapshot()) {
		l.Counters["bell_"+k] = v
	}
	for k, v := range s.counts {
		l.Counters[k] = v
	}
	if c, ok := s.shown.(board.Counting); ok {
		for k, v := range c.Counters() {
			l.Counters[k] += v
		}
	}
	if s.shownL != nil {
		st := s.shownL.Stats()
		for k, v := range status.Counters(st) {
			l.Counters["link_"+k] = v
		}
		for r, v := range st.Downs {
			l.Counters["downs_"+reasonName(virtiomsg.Reason(r))] = v
		}
	}
	if s.shown != nil {
		w := s.shown.Window()
		l.Window = status.Window{Size: w.Mem.Size(), Kind: w.Mem.Kind().String()}
	}
	if a := s.cfg.Options.Account; a != nil {
		l.Bus = status.Counters(a.Load())
	}
	return l
}

func reasonName(r virtiomsg.Reason) string {
	b := []byte(r.String())
	for i := range b {
		if b[i] == ' ' {
			b[i] = '_'
		}
	}
	return string(b)
}

// SumBus adds what the queues of l.Devices count to l.Bus, which has the accesses for anything else. It is called once.
func SumBus(l *status.Link) {
	if l.Bus == nil {
		return
	}
	var sum status.Traffic
	for _, d := range l.Devices {
		for _, q := range d.Queues {
			if q.Bus != nil {
				sum = sum.Plus(q.Bus.Total())
			}
		}
	}
	for k, v := range status.Counters(sum) {
		l.Bus[k] += v
	}
}

// RegionStatus describes regions for an operator.
func RegionStatus(rs []dma.Region) []status.Region {
	out := []status.Region{}
	for _, r := range rs {
		out = append(out, status.Region{Name: r.Name, Addr: uint64(r.Addr), Size: r.Mem.Size(), Access: r.Access.String(), Across: r.Across})
	}
	return out
}
