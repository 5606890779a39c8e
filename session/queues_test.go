package session_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/traffic"
)

// waitPairs waits until both sides use so many queue pairs.
func (l *link) waitPairs(n int) {
	l.t.Helper()
	l.waitUp()
	begin := time.Now()
	for {
		h, a := l.ends[board.Host].Status().Devices[0], l.ends[board.Agent].Status().Devices[0]
		if h.Pairs == n && a.Pairs == n {
			return
		}
		if time.Since(begin) > 10*time.Second {
			l.t.Fatalf("%d queue pairs of the host and %d of the agent are in use, not %d: %+v; %+v", h.Pairs, a.Pairs, n, h, a)
		}
		time.Sleep(time.Millisecond)
	}
}

// carried returns how many pairs of a device have carried frames, each way.
func carried(d status.Device) (rx, tx int) {
	for _, q := range d.Queues {
		switch {
		case q.Pump["frames"] == 0:
		case strings.HasPrefix(q.Name, "rx"):
			rx++
		case strings.HasPrefix(q.Name, "tx"):
			tx++
		}
	}
	return rx, tx
}

// streams passes many TCP connections each way.
func (l *link) streams(ctx context.Context) {
	l.t.Helper()
	for _, s := range []board.Side{board.Host, board.Agent} {
		r, err := traffic.TCP(ctx, l.at(s), l.at(s.Other()), traffic.TCPConfig{Streams: 16, Duration: 100 * time.Millisecond, Grace: 30 * time.Second})
		if err != nil || r.Corrupt != 0 {
			l.t.Errorf("TCP from the %s: %v, %+v", s, err, r)
		}
	}
}

// TestQueues: flows spread over the queue pairs that both sides have, every byte right, whichever end is started anew, or in
// place of one with another number of pairs.
func TestQueues(t *testing.T) {
	for _, c := range []struct {
		name, placement, ring string
		o                     testboard.PairOptions
	}{
		{"push", "push", "split", testboard.PairOptions{Vectors: 8}},
		{"window, packed, one interrupt", "window", "packed", testboard.PairOptions{Vectors: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			l := newLink(t, c.o, c.placement)
			l.ring = c.ring
			l.queues = [2]int{board.Host: 2, board.Agent: 2}
			l.start(board.Host)
			l.start(board.Agent)
			l.waitPairs(2)
			l.streams(ctx)
			for s, e := range l.ends {
				if rx, tx := carried(e.Status().Devices[0]); rx != 2 || tx != 2 {
					t.Errorf("frames went by %d receive and %d transmit queues of the %s", rx, tx, board.Side(s))
				}
			}
			for _, step := range []struct {
				side   board.Side
				queues int
				kill   bool
				want   int
			}{
				{board.Agent, 2, true, 2},
				{board.Host, 2, true, 2},
				{board.Agent, 1, false, 1}, // one that has a single pair, as those before it
				{board.Agent, 4, false, 2},
				{board.Host, 1, false, 1},
				{board.Host, 3, true, 3},
			} {
				if step.kill {
					peer.End(l.spec, step.side).Kill()
				}
				l.end(step.side)
				l.queues[step.side] = step.queues
				l.start(step.side)
				l.waitPairs(step.want)
				l.works(ctx)
			}
			l.streams(ctx)
			for s, e := range l.ends {
				if d := e.Status().Devices[0]; d.Counters["broken"] != 0 || d.LastError != "" {
					t.Errorf("the %s: %+v", board.Side(s), d)
				}
			}
		})
	}
}

// TestQueuesFewer: where memory does not do for as many pairs as there are processors, and the operator did not choose, there are
// fewer; where he chose, there are as many, and no segmentation, which both ends say.
func TestQueuesFewer(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	l := newLink(t, testboard.PairOptions{Options: testboard.Options{BoardMem: 512 << 10}}, "window")
	l.queues = [2]int{board.Host: 4}
	l.start(board.Host)
	l.start(board.Agent)
	l.waitPairs(1)
	l.works(ctx)
	l.end(board.Agent)
	l.queues[board.Agent] = 4
	l.start(board.Agent)
	l.waitPairs(4)
	l.works(ctx)
	for s, e := range l.ends {
		d := e.Status().Devices[0]
		if len(d.Notes) != 1 || !strings.Contains(d.Notes[0], "frames of 64 KiB have no room") || strings.Contains(strings.Join(d.Negotiated, " "), "tso") {
			t.Errorf("the %s says %q, negotiated %s", board.Side(s), d.Notes, d.Negotiated)
		}
	}
}
