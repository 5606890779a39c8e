package testboard

import "github.com/boardlink/boardlink/board"

// rng is splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
// generators, OOPSLA 2014): small, and the same everywhere, so that a seed replays.
type rng uint64

func (r *rng) next() uint64 {
	*r += 0x9e3779b97f4a7c15
	z := uint64(*r)
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// n returns a number below n, which is above 0.
func (r *rng) n(n int) int { return int(r.next() % uint64(n)) }

// move is something that the environment can do, or a processor that can go on.
type move struct {
	what   moveKind
	p      *Proc      // run, timeout, resume, drain, arrive, ring
	from   *Proc      // ring: whose pending store n it is; nil: it is posted
	side   board.Side // deliver, ring, park
	n      int        // deliver, ring: how many; drain, arrive: which entry; takeFault: which
	weight int
}

type moveKind uint8

const (
	run moveKind = iota
	timeout
	resume
	drain
	arrive // drain, then deliver
	deliver
	ring // deliver up to a ring of p, then run p
	park
	takeFault
)

// do performs a move; it returns the processor that goes on, or nil where the
// environment moved.
func (b *Board) do(m *move) *Proc {
	switch m.what {
	case run:
		return m.p
	case timeout:
		m.p.op.flag = 1
		m.p.timedOut = b.steps
		m.p.others = b.steps - m.p.took + patience
		return m.p
	case resume:
		b.note(op{kind: evFault, text: "resume " + m.p.name})
		b.Resume(m.p)
	case drain:
		m.p.c.drain(m.n)
	case arrive:
		m.p.c.drain(m.n)
		b.m.deliver(m.p.c.side, b.m.post[m.p.c.side].len())
	case deliver:
		b.m.deliver(m.side, m.n)
	case ring:
		if m.from != nil {
			m.from.c.drain(m.n)
			b.m.deliver(m.side, b.m.post[m.side].len())
		} else {
			b.m.deliver(m.side, m.n)
		}
		return m.p
	case takeFault:
		b.takeFault(m.n)
	}
	return nil
}

// background lists what the bus and the store buffers can do next, one store at a
// time, the plainest first.
func (b *Board) background(moves []move) []move {
	for _, p := range b.procs {
		for j := range p.c.pending {
			if p.c.free(j) {
				moves = append(moves, move{what: drain, p: p, n: j})
			}
		}
	}
	for d := board.Host; d <= board.Agent; d++ {
		if b.m.post[d].len() > 0 {
			moves = append(moves, move{what: deliver, side: d, n: 1})
		}
	}
	return moves
}

// timeouts lists the time-outs that are possible, that of the processor whose last one is the
// longest ago first.
func (b *Board) timeouts(moves []move) []move {
	from := len(moves)
	for _, p := range b.procs {
		if p.op.kind == opWaitTimeout && !p.done && !p.held {
			moves = append(moves, move{what: timeout, p: p})
			if i := len(moves) - 1; p.timedOut < moves[from].p.timedOut {
				moves[from], moves[i] = moves[i], moves[from]
			}
		}
	}
	return moves
}

// stallTicks is after how many time-outs of others, in a row, a stalled processor goes on.
const stallTicks = 16

// lastResort lists what happens where nothing else can: time-outs; or, after
// stallTicks of them or where there are none, stalled processors that go on.
func (b *Board) lastResort(moves []move) []move {
	b.idle++
	if b.idle <= stallTicks {
		moves = b.timeouts(moves)
		if len(moves) > 0 {
			return moves
		}
	}
	for _, p := range b.procs {
		if p.stalled() {
			moves = append(moves, move{what: resume, p: p})
		}
	}
	b.idle = 0
	if len(moves) == 0 {
		moves = b.timeouts(moves)
	}
	return moves
}

// breath is after how many steps all that is under way gets a chance to arrive, so that
// a loop that polls without Yield ends.
const breath = 512

// random is a random schedule: how likely each thing is, is drawn anew for each run and
// at times during a run, from "at once" to "never unless all sleep".
type random struct {
	r        rng
	deliver  [2]int
	drain    [2]int
	switchTo int
	chances  int // in 64
	timeouts int
	faultAt  []int
}

var reluctance = [...]int{256, 64, 16, 4, 1, 0}

func newRandom(seed uint64, horizon int) *random {
	s := &random{r: rng(seed)}
	for i := 0; i < 5; i++ {
		s.draw(i)
	}
	s.chances = []int{0, 1, 4, 32}[s.r.n(4)]
	s.timeouts = reluctance[2+s.r.n(4)]
	for i := 0; i < 16; i++ {
		s.faultAt = append(s.faultAt, 1+s.r.n(horizon))
	}
	return s
}

// draw draws how likely one kind of move is.
func (s *random) draw(i int) {
	switch i {
	case 0, 1:
		s.deliver[i] = reluctance[s.r.n(6)]
	case 2, 3:
		s.drain[i-2] = reluctance[s.r.n(6)]
	default:
		s.switchTo = reluctance[s.r.n(5)]
	}
}

func (s *random) chance(b *Board) bool { return s.r.n(64) < s.chances }

func (s *random) next(b *Board, p *Proc) *Proc {
	if s.r.n(32) == 0 {
		s.draw(s.r.n(5))
	}
	at := 0
	for i, f := range b.faults {
		for k := f.left; k > 0; k-- {
			if b.steps >= s.faultAt[at%len(s.faultAt)] {
				b.takeFault(i)
			}
			at++
		}
	}
	for {
		floor := 0
		if p != nil && p.op.kind == opYield {
			floor = 16
		}
		if b.steps%breath == 0 {
			floor = 256
		}
		moves, total := b.moves[:0], 0
		add := func(m move, w int) {
			if w > 0 {
				m.weight = w
				total += w
				moves = append(moves, m)
			}
		}
		runnable := false
		for _, q := range b.procs {
			w := s.switchTo
			if q == p {
				w = 256
				if p.op.kind == opYield {
					w = 1
				}
			}
			if b.ready(q) {
				runnable = true
				add(move{what: run, p: q}, w)
			} else if b.mayTimeOut(q) {
				add(move{what: timeout, p: q}, s.timeouts)
			} else if q.stalled() {
				add(move{what: resume, p: q}, s.timeouts)
			}
		}
		n := len(moves)
		moves = b.background(moves)
		if len(moves) == n && !runnable {
			moves = b.lastResort(moves[:0])
			if len(moves) == 0 {
				return nil
			}
			for i := range moves {
				moves[i].weight = 1
			}
			n, total = len(moves), len(moves)
		}
		for i := n; i < len(moves); i++ {
			var w int
			if moves[i].what == deliver {
				w = s.deliver[moves[i].side]
			} else {
				w = s.drain[moves[i].p.c.side]
			}
			if w < floor {
				w = floor
			}
			if !runnable && w == 0 {
				w = 1
			}
			moves[i].weight = w
			total += w
		}
		b.moves = moves
		x := s.r.n(total)
		for i := range moves {
			if x -= moves[i].weight; x < 0 {
				if q := b.do(&moves[i]); q != nil {
					return q
				}
				break
			}
		}
	}
}

// deviation is a choice other than the plain one.
type deviation struct{ at, choice int }

// systematic is the plain schedule of a base, except for listed deviations. Plain means:
// a processor goes on until it sleeps; posted writes are delivered at once (eager) or
// when all sleep (lazy), which the base tells for each direction; stores wait in the processor
// until a barrier, or until all sleep.
type systematic struct {
	eager      [2]bool
	devs       []deviation
	used       int
	points     []uint16 // options of each choice so far
	parked     [2]bool
	faultsOnly bool
	broken     bool // a deviation does not fit: the test is not deterministic
}

func (s *systematic) pick(n int) int {
	i := len(s.points)
	s.points = append(s.points, uint16(n))
	if s.used < len(s.devs) && s.devs[s.used].at == i {
		c := s.devs[s.used].choice
		s.used++
		if c < n {
			return c
		}
		s.broken = true
	}
	return 0
}

// any is pick among things of which none is a fault.
func (s *systematic) any(n int) int {
	if s.faultsOnly {
		return 0
	}
	return s.pick(n)
}

func (s *systematic) chance(b *Board) bool { return !s.faultsOnly && s.pick(2) == 1 }

func (s *systematic) next(b *Board, p *Proc) *Proc {
	if b.steps%breath == 0 {
		for _, q := range b.procs {
			q.c.drainIf(func(*store) bool { return true })
		}
		b.m.deliver(board.Host, b.m.post[board.Host].len())
		b.m.deliver(board.Agent, b.m.post[board.Agent].len())
	}
	yielded, moved := p != nil && p.op.kind == opYield, false
	for {
		for d := range s.eager {
			if s.eager[d] && !s.parked[d] {
				b.m.deliver(board.Side(d), b.m.post[d].len())
			}
		}
		moves := b.moves[:0]
		q := p
		if yielded || !b.ready(p) {
			q = s.after(b, p)
		}
		if yielded && !moved && q != nil && q.op.kind == opYield {
			// All that are awake poll: let something arrive first.
			moved = true
			if moves = b.background(moves); len(moves) > 0 {
				b.moves = moves
				b.do(&moves[s.any(len(moves))])
				continue
			}
		}
		if q == nil {
			s.parked = [2]bool{}
			if moves = b.background(moves); len(moves) == 0 {
				if moves = b.lastResort(moves); len(moves) == 0 {
					return nil
				}
			}
			b.moves = moves
			if n := b.do(&moves[s.any(len(moves))]); n != nil {
				return n
			}
			continue
		}
		moves = s.options(b, q, append(moves, move{what: run, p: q}))
		b.moves = moves
		m := &moves[s.pick(len(moves))]
		if m.what == park {
			s.parked[m.side] = true
			return q
		}
		if n := b.do(m); n != nil {
			return n
		}
	}
}

// after returns the next processor that is ready, in turn.
func (s *systematic) after(b *Board, p *Proc) *Proc {
	from := -1
	if p != nil {
		from = int(p.c.num)
	}
	for i := 1; i <= len(b.procs); i++ {
		if q := b.procs[(from+i+len(b.procs))%len(b.procs)]; b.ready(q) {
			return q
		}
	}
	return nil
}

// ringFor returns the move that lets the next ring for r arrive, if one is under way.
func (b *Board) ringFor(r *Proc) (move, bool) {
	d := r.c.side.Other()
	for i, n := 0, b.m.post[d].len(); i < n; i++ {
		if e := b.m.post[d].at(i); e.bell && e.val == r.op.val {
			return move{what: ring, p: r, side: d, n: i + 1}, true
		}
	}
	for _, q := range b.procs {
		for j := range q.c.pending {
			if e := &q.c.pending[j]; e.bell && e.dst == r.c.side && e.val == r.op.val {
				return move{what: ring, p: r, from: q, side: d, n: j}, true
			}
		}
	}
	return move{}, false
}

// options appends what could happen instead of the plain next step of q, as far as it can
// make a difference that a later choice cannot.
func (s *systematic) options(b *Board, q *Proc, moves []move) []move {
	o := &q.op
	if s.faultsOnly {
		return b.faultMoves(moves)
	}
	if o.kind == opLoad {
		for _, r := range b.procs {
			if r == q {
				continue
			}
			for j := range r.c.pending {
				if e := &r.c.pending[j]; e.overlaps(o.of, o.off, o.width) {
					w := drain
					if !e.local {
						w = arrive
					}
					moves = append(moves, move{what: w, p: r, n: j})
				}
			}
		}
		if o.of == q.c.side {
			d := q.c.side.Other()
			for i, n := 0, b.m.post[d].len(); i < n; i++ {
				if b.m.post[d].at(i).overlaps(o.of, o.off, o.width) {
					moves = append(moves, move{what: deliver, side: d, n: i + 1})
				}
			}
		}
	}
	if d := q.c.side; s.eager[d] && !s.parked[d] && (o.kind == opRing || o.kind == opStore && o.of != d) {
		moves = append(moves, move{what: park, side: d})
	}
	for _, r := range b.procs {
		if r == q || r.done || r.held {
			continue
		}
		if b.ready(r) {
			moves = append(moves, move{what: run, p: r})
			continue
		}
		if m, ok := b.ringFor(r); ok {
			moves = append(moves, m)
		}
		if b.mayTimeOut(r) {
			moves = append(moves, move{what: timeout, p: r})
		}
	}
	return b.faultMoves(moves)
}

// faultMoves lists the faults that can still happen, and the ends of stalls.
func (b *Board) faultMoves(moves []move) []move {
	for i, f := range b.faults {
		if f.left > 0 {
			moves = append(moves, move{what: takeFault, n: i})
		}
	}
	for _, p := range b.procs {
		if p.stalled() {
			moves = append(moves, move{what: resume, p: p})
		}
	}
	return moves
}
