package doorbell

// Assigned are the waiters of several users over fewer (or as many) doorbells.
type Assigned struct {
	ends []end
	fans []*Fanout
}

// end is a user's: a doorbell of its own, or a consumer's of a fan-out.
type end struct {
	bell Waiter
	fan  *Fanout
	i    int
}

// Assign gives each user the end of the doorbell it is to be woken by: users[i] is the
// index in bells of user i's. A doorbell with one user is handed over as it is; one with several
// is fanned out. Close the result after all users have stopped.
func Assign(bells []Waiter, users []int) (*Assigned, error) {
	count := make([]int, len(bells))
	for _, b := range users {
		count[b]++
	}
	a := &Assigned{ends: make([]end, len(users))}
	fan := make([]*Fanout, len(bells))
	next := make([]int, len(bells))
	for i, b := range users {
		if count[b] == 1 || bells[b].FD() < 0 {
			a.ends[i].bell = bells[b]
			continue
		}
		if fan[b] == nil {
			f, err := NewFanout(bells[b], count[b])
			if err != nil {
				a.Close()
				return nil, err
			}
			fan[b] = f
			a.fans = append(a.fans, f)
		}
		a.ends[i] = end{fan: fan[b], i: next[b]}
		next[b]++
	}
	return a, nil
}

// Waiter returns the end of user i. Where the doorbell is shared, the user is rung from the first call on.
func (a *Assigned) Waiter(i int) Waiter {
	if e := &a.ends[i]; e.fan != nil {
		return e.fan.Waiter(e.i)
	}
	return a.ends[i].bell
}

// Close stops the fan-outs. The doorbells themselves stay open.
func (a *Assigned) Close() error {
	var first error
	for _, f := range a.fans {
		if err := f.Close(); err != nil && first == nil {
			first = err
		}
	}
	a.fans = nil
	return first
}
