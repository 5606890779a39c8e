package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// progress shows on a terminal what goes on; elsewhere nothing.
type progress struct {
	w     io.Writer
	on    bool
	start time.Time
	what  chan string
	gone  chan struct{}
}

func newProgress(w io.Writer, on bool) *progress {
	p := &progress{w: w, start: time.Now(), what: make(chan string), gone: make(chan struct{})}
	if f, ok := w.(*os.File); ok && on {
		_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
		p.on = err == nil
	}
	go p.run()
	return p
}

func (p *progress) run() {
	defer close(p.gone)
	t := time.NewTicker(500 * time.Millisecond)
	defer t.Stop()
	what := ""
	for {
		select {
		case s, ok := <-p.what:
			if !ok {
				if p.on {
					fmt.Fprint(p.w, "\r\033[K")
				}
				return
			}
			what = s
		case <-t.C:
		}
		if p.on {
			fmt.Fprintf(p.w, "\r\033[K%3.0f s  %s", time.Since(p.start).Seconds(), what)
		}
	}
}

func (p *progress) step(what string) { p.what <- what }

// done clears the line.
func (p *progress) done() {
	close(p.what)
	<-p.gone
}
