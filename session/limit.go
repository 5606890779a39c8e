package session

import (
	"fmt"
	"sync"
	"time"
)

// A peer may cause lines of a log at will. Of each message limitBurst lines pass at once, then one after limitMin, and each
// next one after twice the time, up to one every limitMax. When a message was not heard for limitMax, it
// starts anew.
const (
	limitBurst = 10
	limitMin   = time.Second
	limitMax   = 5 * time.Minute
	// limitKeys is how many messages are told apart; all further ones are limited as one.
	limitKeys = 256
)

// Limit returns a Logger that passes on what l is to hear, unless the same message comes too often: each
// message (and device, where one is named) by itself, so that none keeps another one out. The next line of a message
// that passes tells how many did not ("suppressed"). Debug is not limited.
func Limit(l Logger) Logger {
	if _, ok := l.(*limited); ok {
		return l
	}
	return &limited{Logger: l, now: time.Now, seen: map[string]*repeated{}}
}

type limited struct {
	Logger
	now  func() time.Time
	mu   sync.Mutex
	seen map[string]*repeated
}

// repeated is what is known of a message.
type repeated struct {
	room    int           // lines that may pass at once
	wait    time.Duration // between lines that pass, once room is used up
	next    time.Time     // when the next one may
	last    time.Time     // when it was last heard
	dropped uint64
}

// key returns what makes lines the same message: its text, and the device it is about.
func key(msg string, args []interface{}) string {
	for i := 0; i+1 < len(args); i += 2 {
		if name, ok := args[i].(string); ok && name == "device" {
			return fmt.Sprint(msg, " ", args[i+1])
		}
	}
	return msg
}

// pass tells whether a line may pass, and returns its arguments.
func (l *limited) pass(msg string, args []interface{}) ([]interface{}, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k, now := key(msg, args), l.now()
	r := l.seen[k]
	if r == nil && len(l.seen) >= limitKeys {
		k = ""
		r = l.seen[k]
	}
	if r == nil {
		r = &repeated{room: limitBurst, wait: limitMin}
		l.seen[k] = r
	} else if now.Sub(r.last) >= limitMax {
		r.room, r.wait = limitBurst, limitMin
	}
	r.last = now
	switch {
	case r.room > 0:
		if r.room--; r.room == 0 {
			r.next = now.Add(r.wait)
		}
	case now.Before(r.next):
		r.dropped++
		return nil, false
	default:
		if r.wait *= 2; r.wait > limitMax {
			r.wait = limitMax
		}
		r.next = now.Add(r.wait)
	}
	if r.dropped != 0 {
		args = append(args[:len(args):len(args)], "suppressed", r.dropped)
		r.dropped = 0
	}
	return args, true
}

// Info implements Logger.
func (l *limited) Info(msg string, args ...interface{}) {
	if args, ok := l.pass(msg, args); ok {
		l.Logger.Info(msg, args...)
	}
}

// Warn implements Logger.
func (l *limited) Warn(msg string, args ...interface{}) {
	if args, ok := l.pass(msg, args); ok {
		l.Logger.Warn(msg, args...)
	}
}

// Error implements Logger.
func (l *limited) Error(msg string, args ...interface{}) {
	if args, ok := l.pass(msg, args); ok {
		l.Logger.Error(msg, args...)
	}
}
