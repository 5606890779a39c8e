package console

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/tty"
)

// A program that ends is started again: at once where it ran for settled, else after a pause of firstPause, twice as long with each
// time, up to maxPause.
const (
	settled    = 10 * time.Second
	firstPause = 250 * time.Millisecond
	maxPause   = 30 * time.Second
)

// killTime is how long a program has after its terminal was hung up until it is killed.
const killTime = time.Second

// Command is an End: a program that runs on a pseudo-terminal of its own, as its controlling terminal, and is started again when it ends.
type Command struct {
	*Pty
	args []string
	logf func(format string, args ...interface{})
	done chan struct{}

	mu     sync.Mutex
	starts uint64
	last   string // how it ended last; "": it has not
	pid    int    // 0: it does not run
}

// Words splits a command line at spaces. Quotes, double or single, keep words together.
func Words(line string) (words []string, err error) {
	var w strings.Builder
	in, quote := false, rune(0)
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			w.WriteRune(r)
		case r == '"' || r == '\'':
			quote, in = r, true
		case r == ' ' || r == '\t':
			if in {
				words = append(words, w.String())
				w.Reset()
			}
			in = false
		default:
			w.WriteRune(r)
			in = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("%q: a quote is not closed", line)
	}
	if in {
		words = append(words, w.String())
	}
	if len(words) == 0 || words[0] == "" {
		return nil, errors.New("the name of the program is empty")
	}
	return words, nil
}

// StartCommand starts a program: args[0] with the other arguments, in which %t stands for the terminal's name below /dev (pts/3), %% for a
// percent sign. What ends it is told to logf, and it is started again. An error tells that there is no such program.
func StartCommand(args []string, logf func(format string, args ...interface{})) (*Command, error) {
	path, err := exec.LookPath(args[0])
	if err != nil {
		var e *exec.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		return nil, fmt.Errorf("%s: %w", args[0], err)
	}
	p, err := newPty()
	if err != nil {
		return nil, err
	}
	p.hold = true
	c := &Command{Pty: p, logf: logf, done: make(chan struct{}), args: []string{path}}
	with := strings.NewReplacer("%%", "%", "%t", strings.TrimPrefix(p.pty.Name(), "/dev/"))
	for _, a := range args[1:] {
		c.args = append(c.args, with.Replace(a))
	}
	p.joined = args[0] + " on " + p.pty.Name()
	go c.keep()
	return c, nil
}

// keep runs the program until Close.
func (c *Command) keep() {
	defer close(c.done)
	told, pause := "", firstPause
	for {
		begin := time.Now()
		how := c.run()
		if time.Since(begin) >= settled {
			told, pause = "", firstPause
		}
		c.mu.Lock()
		c.last = how
		c.mu.Unlock()
		if c.fail(nil) != nil {
			return
		}
		if time.Since(begin) < settled {
			if how != told {
				c.logf("%s ended: %s; it is started again, after %v at first and %v at most", c.args[0], how, firstPause, maxPause)
				told = how
			}
			if c.wait(pause) {
				return
			}
			if pause *= 2; pause > maxPause {
				pause = maxPause
			}
		}
	}
}

// run starts the program, waits for its end, and says how it ended.
func (c *Command) run() string {
	if err := c.pty.Restore(false); err != nil { // an earlier one may have left it in any mode
		return err.Error()
	}
	slave, err := c.pty.OpenSlave()
	if err != nil {
		return err.Error()
	}
	cmd := &exec.Cmd{Path: c.args[0], Args: c.args, Stdin: slave, Stdout: slave, Stderr: slave,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Setctty: true}} // descriptor 0
	if os.Getenv("TERM") == "" {
		cmd.Env = append(os.Environ(), "TERM=vt220")
	}
	err = cmd.Start()
	slave.Close()
	if err != nil {
		return err.Error()
	}
	c.mu.Lock()
	c.starts++
	c.pid = cmd.Process.Pid
	c.mu.Unlock()
	over := make(chan struct{})
	go func() {
		select {
		case <-over:
			return
		case <-c.quit: // its terminal is hung up
		}
		t := time.NewTimer(killTime)
		defer t.Stop()
		select {
		case <-over:
		case <-t.C:
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // the session's first process group
		}
	}()
	err = cmd.Wait()
	close(over)
	c.mu.Lock()
	c.pid = 0
	c.mu.Unlock()
	if err != nil {
		return err.Error()
	}
	return "exit status 0"
}

// Resize implements End.
func (c *Command) Resize(s tty.Size) { c.Pty.Resize(s) }

// State implements End.
func (c *Command) State() (string, map[string]uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := ""
	switch {
	case c.pid == 0 && c.last != "":
		text = fmt.Sprintf("%s does not run: it ended with %s, and is started again", c.args[0], c.last)
	case c.last != "":
		text = fmt.Sprintf("%s runs as process %d; one before ended with %s", c.args[0], c.pid, c.last)
	case c.pid != 0:
		text = fmt.Sprintf("%s runs as process %d", c.args[0], c.pid)
	}
	return text, map[string]uint64{"program_starts": c.starts}
}

// Close implements End. The terminal is hung up, which ends the programs on it; one that stays is killed.
func (c *Command) Close() error {
	err := c.Pty.Close()
	<-c.done
	return err
}
