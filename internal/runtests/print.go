package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// blockLines is how much of one failure is shown; the log has it all.
const blockLines = 60

// screen is what the printers of stages that run side by side share.
type screen struct {
	mu    sync.Mutex
	w     io.Writer
	tty   bool
	dirty bool // a line without its end stands on the terminal
}

// printer prints the stages of one row. On a terminal a stage under way rewrites its line
// every second; elsewhere it says so once after two seconds, and then twice a
// minute.
type printer struct {
	*screen
	name  string
	what  string
	start time.Time
	muted bool // no progress: another row has it
	stop  chan struct{}
	done  chan struct{}
}

func newPrinter(f *os.File) *printer {
	st, err := f.Stat()
	tty := err == nil && st.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
	return &printer{screen: &screen{w: f, tty: tty}}
}

// beside returns a printer for stages that run beside those of p. It shows no progress until mute(false).
func (p *printer) beside() *printer { return &printer{screen: p.screen, muted: true} }

func (p *printer) mute(on bool) {
	p.mu.Lock()
	p.muted = on
	p.mu.Unlock()
}

// begin starts the progress of a stage.
func (p *printer) begin(name string) {
	p.mu.Lock()
	p.name, p.what, p.start = name, "", time.Now()
	p.mu.Unlock()
	p.stop, p.done = make(chan struct{}), make(chan struct{})
	go p.progress()
}

// end stops the progress.
func (p *printer) end() {
	close(p.stop)
	<-p.done
}

func (p *printer) progress() {
	defer close(p.done)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	next := 2 * time.Second
	for {
		select {
		case <-p.stop:
			return
		case <-tick.C:
		}
		p.mu.Lock()
		took := time.Since(p.start)
		switch {
		case took < 2*time.Second || p.muted:
		case p.tty:
			p.erase()
			fmt.Fprintf(p.w, "%-8s ...  %8s  %.50s", p.name, seconds(took), p.what)
			p.dirty = true
		case took >= next:
			fmt.Fprintf(p.w, "%-8s ...  %8s  %.50s\n", p.name, seconds(took), p.what)
			next = took + 30*time.Second
		}
		p.mu.Unlock()
	}
}

// doing says what the stage is at, for the progress line.
func (p *printer) doing(what string) {
	p.mu.Lock()
	p.what = what
	p.mu.Unlock()
}

func (p *screen) erase() {
	if p.dirty {
		io.WriteString(p.w, "\r\x1b[K")
		p.dirty = false
	}
}

// plain prints a line as it is.
func (p *screen) plain(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.erase()
	fmt.Fprintln(p.w, line)
}

// line prints the line of a finished stage.
func (p *printer) line(name, state string, took time.Duration, detail string) {
	p.plain(strings.TrimRight(fmt.Sprintf("%-8s %-4s %8s  %s", name, state, seconds(took), detail), " "))
}

// block prints texts below a stage's line, indented, each cut to its first and last
// lines.
func (p *printer) block(texts []string, log string) {
	for _, t := range texts {
		l := strings.Split(t, "\n")
		if n := len(l); n > blockLines {
			cut := fmt.Sprintf("... %d lines, see %s ...", n-blockLines, log)
			l = append(append(append([]string{}, l[:blockLines/2]...), cut), l[n-blockLines/2:]...)
		}
		for _, s := range l {
			p.plain("    " + s)
		}
	}
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
