package agent

import (
	"github.com/boardlink/boardlink/virtiomsg"
)

// limitPairs lowers the number of pairs of devices for which the operator did not choose it, so that further pairs do not share the
// doorbells of the first ones, where those have them to themselves.
func (l *handler) limitPairs(vectors uint32) {
	most := 1
	for _, d := range l.devs {
		if n, chosen := d.n.Pairs(); !chosen && n > most {
			most = n
		}
	}
	best := l.alone(vectors, 1)
	for most > 1 && l.alone(vectors, most) < best {
		most--
	}
	l.alone(vectors, most)
	l.pairs = most
}

// alone sets the number of pairs where the operator did not choose it, and returns how many queues of first pairs have a vector to
// themselves then.
func (l *handler) alone(vectors uint32, pairs int) int {
	users := map[uint32]int{}
	for _, d := range l.devs {
		n, chosen := d.n.Pairs()
		if !chosen && n > pairs {
			n = pairs
		}
		d.n.LimitPairs(n)
		for q := 0; q < 2*n; q++ {
			users[virtiomsg.Vector(d.n.Number(), uint32(q), vectors)]++
		}
	}
	own := 0
	for _, d := range l.devs {
		for q := uint32(0); q < 2; q++ {
			if users[virtiomsg.Vector(d.n.Number(), q, vectors)] == 1 {
				own++
			}
		}
	}
	return own
}
