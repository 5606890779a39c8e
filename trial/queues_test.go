//go:build linux

package trial_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/traffic"
)

// pairsWithFrames returns how many queue pairs of a device have carried frames, each way.
func pairsWithFrames(d status.Device) (rx, tx int) {
	for _, q := range d.Queues {
		if q.Pump["frames"] == 0 || q.Name == "ctrl" {
			continue
		}
		if q.Index%2 == 0 {
			rx++
		} else {
			tx++
		}
	}
	return rx, tx
}

// Several flows over four queue pairs: more than one pair carries them, each way and on both sides, every byte is right, and
// both ends can be killed.
func TestQueues(t *testing.T) {
	const pairs = 4
	for _, c := range []trial.Config{
		{Link: "tap", Offload: true, MTU: 1500, Queues: pairs},
		{Link: "tun", MTU: 9000, Queues: pairs, Placement: "window", Memory: "uncached", Ring: "packed", Vectors: 1, Window: 4 << 20},
	} {
		t.Run(fmt.Sprintf("%s %s %s", c.Link, c.Placement, c.Ring), func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			r := start(t, c)
			p := r.Pairs(0)
			flows := func() {
				t.Helper()
				for _, s := range p {
					for _, ends := range [][2]traffic.Endpoint{{s.Board, s.Host}, {s.Host, s.Board}} {
						res, err := traffic.TCP(ctx, ends[0], ends[1], traffic.TCPConfig{Streams: 16, Duration: 50 * time.Millisecond, Grace: 30 * time.Second})
						if err != nil || res.Corrupt != 0 {
							t.Errorf("TCP: %v, %+v", err, res)
						}
					}
				}
			}
			check := func() {
				t.Helper()
				for _, s := range []board.Side{board.Host, board.Agent} {
					d := getStatus(t, r, s).Links[0].Devices[0]
					rx, tx := pairsWithFrames(d)
					if d.Pairs != pairs || d.MaxPairs != pairs || rx < 2 || tx < 2 {
						t.Errorf("%s: %d of %d pairs in use; frames in %d receive and %d transmit queues", s, d.Pairs, d.MaxPairs, rx, tx)
					}
					if d.Counters["broken"] != 0 || d.LastError != "" {
						t.Errorf("%s: %v, %q", s, d.Counters, d.LastError)
					}
				}
			}
			// The agent asks for them once the link is up.
			waitPairs := func() {
				t.Helper()
				for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
					host, agent := getStatus(t, r, board.Host).Links[0].Devices[0], getStatus(t, r, board.Agent).Links[0].Devices[0]
					if host.Pairs == pairs && agent.Pairs == pairs {
						return
					}
					if time.Since(begin) > 20*time.Second {
						t.Fatalf("the host uses %d pairs, the agent %d: %q, %q", host.Pairs, agent.Pairs, host.LastError, agent.LastError)
					}
				}
			}
			waitPairs()
			flows()
			check()
			for _, s := range []board.Side{board.Agent, board.Host} {
				if err := r.Kill(s); err != nil {
					t.Fatal(err)
				}
				if err := r.StartSide(s); err != nil {
					t.Fatal(err)
				}
				// The one that is left may not have noticed yet.
				for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
					if st := getStatus(t, r, s.Other()); st.Links[0].Counters["link_ups"] > 1 {
						break
					}
					if time.Since(begin) > 20*time.Second {
						t.Fatalf("the %s does not see that the %s was replaced", s.Other(), s)
					}
				}
				waitUp(t, r)
				waitPairs()
				flows()
			}
			check()
		})
	}
}
