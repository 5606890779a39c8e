// Package daemon is what programs that run for long need around their work: signals that end them, also where something of
// them is stuck, and a standard error that cannot hold them up.
//
// It must not know what the program does. The lean programs use it too.
package daemon

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// StopLimit is how long a program may take to end after the first signal; then it exits with status 1, whatever is stuck. The ends of a link
// need less: session.ErrStuck comes sooner.
const StopLimit = 8 * time.Second

// once is how soon after the first signal another one counts as the same: a terminal that is closed sends several.
const once = 300 * time.Millisecond

// Context returns a context that ends with the first SIGINT, SIGTERM or SIGHUP (which stays ignored where the program was
// started so, as nohup does). A second signal, and the end of StopLimit, end the program at once with status 1. stop gives
// the signals back. SIGPIPE does nothing from then on: writes to what nobody reads fail.
//
// log is where the program's last line goes.
func Context(log *Queue) (ctx context.Context, stop func()) { return contextWithin(log, StopLimit) }

func contextWithin(log *Queue, limit time.Duration) (context.Context, func()) {
	signals := make(chan os.Signal, 4)
	catch := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		catch = append(catch, syscall.SIGHUP)
	}
	signal.Notify(signals, catch...)
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		var first os.Signal
		select {
		case <-done:
			return
		case first = <-signals:
		}
		cancel()
		came := time.Now()
		late := time.NewTimer(limit)
		defer late.Stop()
		for {
			select {
			case <-done:
				return
			case s := <-signals:
				if time.Since(came) < once {
					continue
				}
				log.exit(fmt.Sprintf("ending at once: a second signal (%v)", s))
			case <-late.C:
				log.exit(fmt.Sprintf("ending at once: something is stuck, %v after the signal (%v)", limit, first))
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel()
		close(done)
	}
}

// exit writes a line and ends the program.
func (q *Queue) exit(msg string) {
	q.Write([]byte(line("ERROR", msg)))
	q.Flush(FlushLimit)
	os.Exit(1)
}

// line formats a line of the log as the programs do.
func line(level, msg string) string {
	return fmt.Sprintf("time=%s level=%s msg=%q", time.Now().Format("2006-01-02T15:04:05.000Z07:00"), level, msg) + "\n"
}
