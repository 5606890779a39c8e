package session

import (
	"context"
	"errors"
	"sync"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/virtiomsg"
)

// ErrEnded: the session has ended, and does nothing any more.
var ErrEnded = errors.New("the link has ended")

// posts are functions that wait to be run on the owner's goroutine.
type posts struct {
	mu   sync.Mutex
	life life
	list []*post
	bell chan struct{} // there are some
}

// life is whether somebody runs what is posted.
type life uint8

const (
	lifeNew     life = iota // neither Open nor Run was called: whoever posts runs it
	lifeRunning             // Run does, or will
	lifeEnded               // nobody does any more
)

type post struct {
	f    func()
	done chan struct{}
	err  error // valid when done is closed
}

// run runs the post, and returns a bus error that ended it.
func (j *post) run() error {
	err := pci.Guard(j.f)
	j.err = err
	close(j.done)
	return err
}

// begin says that what is posted from now on waits for Run.
func (p *posts) begin() {
	p.mu.Lock()
	p.life = lifeRunning
	p.mu.Unlock()
}

// end runs no more of what is posted. With to lifeNew, Run did not begin.
func (p *posts) end(to life) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.life = to
	for _, j := range p.list {
		j.err = ErrEnded
		close(j.done)
	}
	p.list = nil
}

// next takes the first post; nil: there is none.
func (p *posts) next() *post {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.list) == 0 {
		return nil
	}
	j := p.list[0]
	p.list = p.list[1:]
	return j
}

// run runs all posts.
func (p *posts) run() {
	for j := p.next(); j != nil; j = p.next() {
		j.run()
	}
}

// withdraw takes a post out that was not begun, and tells whether it did.
func (p *posts) withdraw(j *post) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, o := range p.list {
		if o == j {
			p.list = append(p.list[:i], p.list[i+1:]...)
			return true
		}
	}
	return false
}

// Do runs f on the owner's goroutine, between two messages, and returns when it has run: f may use what the
// methods of Handler may. It runs also without a board; while a link goes down, takes its leave or is stuck, f waits. Before Open and Run it runs on the
// caller's goroutine. Errors: ErrEnded, and that of ctx: f did not run then; a bus error: f was
// interrupted, and the link goes down. Do must not be called on that goroutine.
func (s *Session) Do(ctx context.Context, f func()) error {
	p := &s.posts
	p.mu.Lock()
	switch p.life {
	case lifeNew:
		defer p.mu.Unlock()
		f()
		return nil
	case lifeEnded:
		p.mu.Unlock()
		return ErrEnded
	}
	j := &post{f: f, done: make(chan struct{})}
	p.list = append(p.list, j)
	p.mu.Unlock()
	ring(p.bell)
	select {
	case <-j.done:
		return j.err
	case <-ctx.Done():
	}
	if p.withdraw(j) {
		return ctx.Err()
	}
	<-j.done
	return j.err
}

// AddQueues gives queues of this side that were not among Handler.Queues when the board was opened the ends of their
// doorbells. Without a board there is nothing to do: Queues is asked when it is opened. After an error none
// has one. It is called on the owner's goroutine.
func (s *Session) AddQueues(qs []Queue) error {
	if s.b == nil {
		return nil
	}
	for i, q := range qs {
		user, err := s.assigned.Add(userOf(q, vectorsOf(s.b.Self())))
		if err != nil {
			s.RemoveQueues(qs[:i])
			return err
		}
		s.users[q.QueueID] = user
	}
	return nil
}

// RemoveQueues takes the ends of their doorbells from queues whose loops have stopped. It is called on the owner's
// goroutine.
func (s *Session) RemoveQueues(qs []Queue) {
	if s.b == nil {
		return
	}
	for _, q := range qs {
		if user, ok := s.users[q.QueueID]; ok {
			delete(s.users, q.QueueID)
			s.assigned.Remove(user)
		}
	}
}

// vectorsOf returns how many doorbells a side has, at least 1.
func vectorsOf(self board.RingInfo) uint32 {
	if self.Vectors != 0 {
		return self.Vectors
	}
	return 1
}

// ErrRemoved: the other side has removed the device that a request is for. The event that told so is handed to
// Handler.Message next.
var ErrRemoved = errors.New("the other side has removed the device")

// removed tells whether an event that was put aside says that a device is gone.
func (s *Session) removed(dev uint16) bool {
	for i := range s.deferred {
		if virtiomsg.Removes(&s.deferred[i], dev) {
			return true
		}
	}
	return false
}
