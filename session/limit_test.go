package session

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// lines is a Logger that keeps what it hears.
type lines []string

func (l *lines) add(msg string, args []interface{}) {
	*l = append(*l, strings.TrimSpace(msg+" "+fmt.Sprint(args...)))
}
func (l *lines) Debug(msg string, args ...interface{}) { l.add(msg, args) }
func (l *lines) Info(msg string, args ...interface{})  { l.add(msg, args) }
func (l *lines) Warn(msg string, args ...interface{})  { l.add(msg, args) }
func (l *lines) Error(msg string, args ...interface{}) { l.add(msg, args) }

// TestLimitDecays: what is repeated without end comes to one line in five minutes, which tell of every one that did not pass, and keeps
// no other message out.
func TestLimitDecays(t *testing.T) {
	var out lines
	l := Limit(&out).(*limited)
	now := time.Unix(1e9, 0)
	l.now = func() time.Time { return now }
	const day = 24 * time.Hour
	sent, at := 0, []int{}
	for begin := now; now.Sub(begin) < day; now = now.Add(100 * time.Millisecond) {
		l.Warn("the other side breaks the link", "error", "x")
		sent++
		at = append(at, len(out))
	}
	hour := int(time.Hour / (100 * time.Millisecond))
	if n := len(out); n > 310 || n < 288 {
		t.Errorf("%d lines in a day", n)
	}
	if n := at[hour-1]; n > limitBurst+20 {
		t.Errorf("%d lines in the first hour", n)
	}
	if n := at[2*hour-1] - at[hour-1]; n > 13 || n < 11 {
		t.Errorf("%d lines in the second hour", n)
	}
	told := len(out)
	for _, s := range out {
		if i := strings.Index(s, "suppressed"); i >= 0 {
			var n int
			if _, err := fmt.Sscan(strings.TrimSpace(s[i+len("suppressed"):]), &n); err != nil {
				t.Fatalf("%q: %v", s, err)
			}
			told += n
		}
	}
	if d := sent - told; d < 0 || d > 3000 {
		t.Errorf("%d lines were sent, %d passed or were counted", sent, told)
	}
	before := len(out)
	l.Info("device up", "device", "net0")
	l.Info("link up")
	if len(out) != before+2 || strings.Contains(out[before], "suppressed") {
		t.Errorf("one-off lines behind a flood: %q", out[before:])
	}
	for i := 0; i < 100; i++ {
		l.Warn("device needs a reset", "device", uint16(3))
	}
	before = len(out)
	l.Warn("device needs a reset", "device", uint16(4))
	if len(out) != before+1 {
		t.Error("one device keeps the line of another one out")
	}
	now = now.Add(limitMax)
	before = len(out)
	for i := 0; i < limitBurst; i++ {
		l.Warn("the other side breaks the link", "error", "x")
	}
	if len(out) != before+limitBurst {
		t.Errorf("%d of %d lines passed after quiet", len(out)-before, limitBurst)
	}
	for i := 0; i < 100*limitKeys; i++ {
		l.Warn(fmt.Sprintf("message %d", i))
	}
	if len(l.seen) > limitKeys+1 {
		t.Errorf("%d messages are kept apart", len(l.seen))
	}
}
