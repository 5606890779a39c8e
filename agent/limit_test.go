package agent

import (
	"fmt"
	"testing"

	"github.com/boardlink/boardlink/driver"
)

// paired is a driver that has a number of queue pairs, and nothing else.
type paired struct {
	driver.Driver
	number       uint16
	pairs, limit int
	chosen       bool
}

func (p *paired) Number() uint16     { return p.number }
func (p *paired) Pairs() (int, bool) { return p.pairs, p.chosen }
func (p *paired) LimitPairs(n int)   { p.limit = n }

// TestLimitPairs: pairs that the operator did not choose leave the first pairs their doorbells.
func TestLimitPairs(t *testing.T) {
	const cpus = 4
	for _, c := range []struct {
		vectors uint32
		chosen  []int // by device; 0: not chosen
		want    []int
	}{
		{32, []int{0}, []int{4}},
		{9, []int{0}, []int{4}},       // one for each queue, and the control plane's
		{8, []int{0}, []int{3}},       // the fourth pair would share with the first
		{4, []int{0}, []int{1}},       // the third vector is a second pair's, half of it
		{3, []int{0}, []int{1}},       //
		{2, []int{0}, []int{4}},       // shared anyway
		{1, []int{0}, []int{4}},       // one interrupt: the same
		{3, []int{4}, []int{4}},       // the operator's choice
		{8, []int{0, 0}, []int{1, 1}}, // second pairs: 7 to 4, and 4 is a first one's
		{9, []int{0, 0}, []int{2, 2}},
		{32, []int{0, 0, 0}, []int{4, 4, 4}},
		{32, []int{2, 0}, []int{2, 4}},
		{0, []int{0}, []int{4}}, // a side that is not rung polls
	} {
		l := &handler{}
		for i, n := range c.chosen {
			d := &paired{number: uint16(i), pairs: cpus, chosen: n != 0}
			if n != 0 {
				d.pairs = n
			}
			l.devs = append(l.devs, &device{n: d, index: i})
		}
		l.limitPairs(c.vectors)
		var got []int
		for _, d := range l.devs {
			got = append(got, d.n.(*paired).limit)
		}
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%d vectors, chosen %v: %v pairs, want %v", c.vectors, c.chosen, got, c.want)
		}
	}
}
