package agent

import (
	"fmt"
	"testing"

	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/session"
)

// short is a driver that has less than was asked for, of which the host makes something else each time.
type short struct {
	driver.Driver
	n int
}

func (s *short) Name() string   { return "net0" }
func (s *short) Joined() string { return "bl0" }
func (s *short) Unmet() []string {
	return []string{fmt.Sprintf("the MTU is %d, not the 9000 that was asked for", s.n)}
}
func (s *short) Warning() string { return fmt.Sprintf("its MTU stays 9000, %d is wanted", s.n) }

// counter counts lines.
type counter struct{ lines int }

func (c *counter) Debug(string, ...interface{}) {}
func (c *counter) Info(string, ...interface{})  { c.lines++ }
func (c *counter) Warn(string, ...interface{})  { c.lines++ }
func (c *counter) Error(string, ...interface{}) { c.lines++ }

// TestTellsSparingly: what a host may change without end is told of once while it stays, and fills neither log nor memory
// where it does not.
func TestTellsSparingly(t *testing.T) {
	c := new(counter)
	n := new(short)
	d := &device{l: &Link{cfg: Config{Log: session.Limit(c)}}, n: n}
	for range 5 {
		d.tellUnmet()
	}
	if c.lines != 1 {
		t.Errorf("%d lines about the same", c.lines)
	}
	for n.n = 0; n.n < 5000; n.n++ {
		d.tellUnmet()
		d.tellWarning()
	}
	if c.lines > 40 {
		t.Errorf("%d lines", c.lines)
	}
	if len(d.unmet) != 1 {
		t.Errorf("%d things are kept", len(d.unmet))
	}
}
