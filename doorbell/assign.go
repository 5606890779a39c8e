package doorbell

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// Assigned are the ends of several users of fewer (or as many) doorbells. Users may come and go while others
// sleep on theirs.
type Assigned struct {
	mu    sync.Mutex
	bells []line
	users []*End // by number; nil: gone
	free  []int  // numbers of users that are gone
}

// line is one doorbell with its users.
type line struct {
	bell Waiter
	ends []*End
	fan  *Fanout // nil: at most one user, who has the doorbell itself, or nothing to wait for
}

// End is a user's end of a doorbell: the doorbell itself, or, where others share it, an end of a Fanout. Which of both it is
// changes as others come and go; a Sleeper follows.
type End struct {
	at    atomic.Value // *spot
	line  int
	class Class
	taken uint32  // 1: Assigned.Waiter was called; with sync/atomic
	own   *outlet // its end in fan-outs; kept for the next one, as a loop may still sleep on it
}

// spot is what an End stands for at present.
type spot struct {
	w    Waiter
	fd   int
	seen uint32 // 1: FD has been asked since; with sync/atomic
}

// FD implements Waiter.
func (e *End) FD() int {
	s := e.at.Load().(*spot)
	if atomic.LoadUint32(&s.seen) == 0 {
		atomic.StoreUint32(&s.seen, 1)
	}
	return s.fd
}

// Ack implements Waiter.
func (e *End) Ack() (uint64, error) { return e.at.Load().(*spot).w.Ack() }

// eventfd tells whether what the End stands for is an eventfd.
func (e *End) eventfd() bool {
	_, ok := e.at.Load().(*spot).w.(*Eventfd)
	return ok
}

func (e *End) move(w Waiter) { e.at.Store(&spot{w: w, fd: w.FD()}) }

// left tells that no sleep of the user on what the End stood for before can begin any more.
func (e *End) left() bool {
	return atomic.LoadUint32(&e.taken) == 0 || atomic.LoadUint32(&e.at.Load().(*spot).seen) != 0
}

// take gives the End an eventfd of its own, unless it has one.
func (e *End) take() error {
	if e.own != nil {
		return nil
	}
	bell, err := NewEventfd()
	if err != nil {
		return err
	}
	e.own = &outlet{bell: bell, class: e.class, used: atomic.LoadUint32(&e.taken)}
	return nil
}

// Assign gives each user the end of the doorbell it is to be woken by. A doorbell with one user is handed over as it is;
// one with several is fanned out, and rings them in the order of their classes. Close the result after all users have
// stopped.
func Assign(bells []Waiter, users []User) (*Assigned, error) {
	a := &Assigned{bells: make([]line, len(bells))}
	for i, b := range bells {
		a.bells[i].bell = b
	}
	for _, u := range users {
		e := &End{line: u.Bell, class: u.Class}
		e.move(bells[u.Bell])
		a.bells[u.Bell].ends = append(a.bells[u.Bell].ends, e)
		a.users = append(a.users, e)
	}
	for i := range a.bells {
		l := &a.bells[i]
		if len(l.ends) < 2 || l.bell.FD() < 0 {
			continue
		}
		if err := l.share(nil); err != nil {
			a.Close()
			return nil, err
		}
	}
	return a, nil
}

// share fans the doorbell out to all its users. sleeper, if not nil, is the one of them that may sleep on it.
func (l *line) share(sleeper *End) error {
	outs := make([]*outlet, 0, len(l.ends))
	for _, e := range l.ends {
		if err := e.take(); err != nil {
			return err
		}
		outs = inOrder(outs, e.own)
	}
	var moved func() bool
	if sleeper != nil {
		sleeper.move(sleeper.own.bell)
		moved = sleeper.left
	}
	fan, err := startFanout(l.bell, outs, moved)
	if err != nil {
		if sleeper != nil {
			sleeper.move(l.bell)
		}
		return err
	}
	l.fan = fan
	for _, e := range l.ends {
		if e != sleeper {
			e.move(e.own.bell)
		}
	}
	return nil
}

// Add adds a user of one of the doorbells that Assign was given, and returns its number.
func (a *Assigned) Add(u User) (user int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if u.Bell < 0 || u.Bell >= len(a.bells) {
		return 0, fmt.Errorf("doorbell: no doorbell %d: there are %d", u.Bell, len(a.bells))
	}
	l := &a.bells[u.Bell]
	e := &End{line: u.Bell, class: u.Class}
	e.move(l.bell)
	before := l.ends
	l.ends = append(l.ends[:len(l.ends):len(l.ends)], e)
	switch {
	case l.bell.FD() < 0:
	case l.fan != nil:
		if err = e.take(); err == nil {
			e.move(e.own.bell)
			l.fan.add(e.own)
		}
	case len(l.ends) == 2:
		err = l.share(before[0])
	}
	if err != nil {
		l.ends = before
		if e.own != nil {
			e.own.bell.Close()
		}
		return 0, err
	}
	if n := len(a.free); n > 0 {
		user, a.free = a.free[n-1], a.free[:n-1]
		a.users[user] = e
		return user, nil
	}
	a.users = append(a.users, e)
	return len(a.users) - 1, nil
}

// Remove takes a user out, whose loops have stopped. Its number may come back into use.
func (a *Assigned) Remove(user int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	e := a.users[user]
	if e == nil {
		return
	}
	a.users[user], a.free = nil, append(a.free, user)
	l := &a.bells[e.line]
	var ends []*End
	for _, o := range l.ends {
		if o != e {
			ends = append(ends, o)
		}
	}
	l.ends = ends
	if l.fan != nil {
		l.fan.remove(e.own)
		if len(ends) < 2 {
			l.unshare()
		}
	}
	if e.own != nil {
		e.own.bell.Close()
	}
}

// unshare gives the doorbell back to the one user that is left, who may sleep on its end of the fan-out.
func (l *line) unshare() {
	for _, e := range l.ends {
		l.fan.remove(e.own)
	}
	// Before the user moves: the fan-out must not take a ring away from one that sleeps on the doorbell already. What it has taken, the
	// last Ring makes good.
	l.fan.end()
	l.fan = nil
	for _, e := range l.ends {
		atomic.StoreUint32(&e.own.gone, 0) // for the next time
		e.move(l.bell)
		e.own.bell.Ring()
	}
}

// Waiter returns the end of a user. Where the doorbell is shared, the user is rung from the first call on.
func (a *Assigned) Waiter(user int) Waiter {
	a.mu.Lock()
	defer a.mu.Unlock()
	e := a.users[user]
	atomic.StoreUint32(&e.taken, 1)
	if e.own != nil {
		atomic.StoreUint32(&e.own.used, 1)
	}
	return e
}

// Close stops the fan-outs. The doorbells themselves stay open.
func (a *Assigned) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range a.bells {
		l := &a.bells[i]
		if l.fan != nil {
			l.fan.end() // closes the ends
			l.fan = nil
		} else {
			for _, e := range l.ends {
				if e.own != nil {
					e.own.bell.Close()
				}
			}
		}
		l.ends = nil
	}
	return nil
}
