package block

import (
	"sync"
	"sync/atomic"

	"github.com/boardlink/boardlink/device/internal/plain"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/vring"
)

// request is a chain of a queue that was handed over to the pool.
type request struct {
	w      *plain.Worker
	chain  vring.Chain
	ticket uint64
	spans  []dma.Span // of the chain, its readable ones first
}

// pool serves requests by goroutines that may block. It starts them as they are needed, and keeps them.
type pool struct {
	work  func(*scratch, *request)
	tasks chan *request
	most  int
	idle  int32 // goroutines that wait for a request; with sync/atomic
	wg    sync.WaitGroup

	mu      sync.Mutex // guards what follows
	started int
	free    []*request
}

// newPool returns a pool of up to most goroutines. No more than queued requests are submitted and not yet served at any time.
func newPool(most, queued int, work func(*scratch, *request)) *pool {
	return &pool{work: work, most: most, tasks: make(chan *request, queued)}
}

// request returns a request to be filled in.
func (p *pool) request() *request {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.free); n > 0 {
		r := p.free[n-1]
		p.free = p.free[:n-1]
		return r
	}
	return &request{}
}

// submit has a request served.
func (p *pool) submit(r *request) {
	p.tasks <- r
	if int(atomic.LoadInt32(&p.idle)) >= len(p.tasks) {
		return
	}
	p.mu.Lock()
	more := p.started < p.most
	if more {
		p.started++
		p.wg.Add(1)
	}
	p.mu.Unlock()
	if more {
		go p.run()
	}
}

func (p *pool) run() {
	defer p.wg.Done()
	s := &scratch{}
	for {
		atomic.AddInt32(&p.idle, 1)
		r, ok := <-p.tasks
		atomic.AddInt32(&p.idle, -1)
		if !ok {
			return
		}
		p.work(s, r)
		p.done(r)
	}
}

// done takes a request back that was served.
func (p *pool) done(r *request) {
	p.mu.Lock()
	p.free = append(p.free, r)
	p.mu.Unlock()
}

// close ends the goroutines. Nothing is submitted any more.
func (p *pool) close() {
	close(p.tasks)
	p.wg.Wait()
}
