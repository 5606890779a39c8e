package host_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/virtiomsg"
)

// TestInFlight: an agent sends requests as long as the FIFO takes them, and reads no answers for a while. The
// link stays up; what has no room waits: requests in the FIFO, a reset that is needed with the host.
func TestInFlight(t *testing.T) {
	for _, slots := range []uint32{1, 2, virtiomsg.MaxSlots} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			t.Parallel()
			_, spec := peer.NewBoard(t, testboard.PairOptions{})
			r := newRig(t, spec)
			d := r.Declared
			d.SlotsAgentToHost, d.SlotsHostToAgent = slots, slots
			r.Redeclare(d)
			r.bringUp(plain)
			r.Mute = true
			downs := r.Downs
			var tokens []uint16
			// The answers that fit, and the requests behind them.
			for quiet := time.Now(); len(tokens) < int(2*slots) || time.Since(quiet) < 30*time.Millisecond; r.Step() {
				var m virtiomsg.Slot
				token := r.Token()
				virtiomsg.EncodeGetDeviceStatus(&m, dev, token)
				if r.Link.Send(&m) == nil {
					tokens, quiet = append(tokens, token), time.Now()
				} else if time.Since(quiet) > 5*time.Second {
					t.Fatalf("%d requests of %d go out, then none: the link went down %d times", len(tokens), 2*slots, r.Downs-downs)
				}
			}
			if n := len(tokens); n != int(2*slots) {
				t.Errorf("%d requests went out, %d have room", n, 2*slots)
			}
			r.Until(20*time.Second, "a request waits for room", func() bool { return r.count("no_room") == 1 })
			avail := r.queue[1].driver.Mem()
			avail.Barrier(mmio.WriteBarrier)
			avail.Store16(2, 1000) // far ahead
			r.Ring(dev, 1)
			r.Until(20*time.Second, "the host finds the broken queue", func() bool { return r.count("device_resets") == 1 })
			r.For(30 * time.Millisecond)
			r.Mute = false
			r.Until(20*time.Second, "all requests are answered", func() bool { return len(r.Answers) == len(tokens) })
			for _, token := range tokens {
				if _, ok := r.Answers[token]; !ok {
					t.Errorf("no answer for token %d", token)
				}
			}
			r.needsReset("")
			if r.Downs != downs {
				t.Errorf("the link went down %d times", r.Downs-downs)
			}
			r.bringUp(plain)
			r.works()
		})
	}
}

// newLoopback serves shared memory and returns the spec of the board that it is.
func newLoopback(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 2 << 20, Vectors: 4})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	t.Cleanup(func() { s.Close(); <-served })
	return "loopback:" + path
}

// TestPingFlood: what an agent asks without end is answered at a bounded rate, and nothing is lost of it.
func TestPingFlood(t *testing.T) {
	pace := session.Pace{Messages: session.Rate{Every: 5 * time.Millisecond, Burst: 100}}
	r := newPacedRig(t, newLoopback(t), 0, pace)
	begin, before, sent := time.Now(), r.count("requests"), 0
	token := r.Token() // a new one for each that is sent: they come round after 65,535
	var m virtiomsg.Slot
	for time.Since(begin) < 400*time.Millisecond || (r.count("throttled") == 0 || r.count("requests")-before < 100) && time.Since(begin) < 20*time.Second {
		virtiomsg.EncodePing(&m, token, 1)
		if r.Link.Send(&m) == nil {
			token = r.Token()
			sent++
			r.Ring(dev, 1<<16) // vector 0 or not, it rings without end
		}
		r.Step()
	}
	n, most := r.count("requests")-before, 101+uint64(time.Since(begin)/pace.Messages.Every)
	if n > most || n < 100 {
		t.Errorf("%d requests answered, at most %d may be", n, most)
	}
	if r.count("throttled") == 0 {
		t.Error("nothing is counted")
	}
	r.Until(20*time.Second, "the rest is answered", func() bool { return len(r.Answers) == sent })
	if r.Downs != 0 {
		t.Errorf("the link went down %d times", r.Downs)
	}
}

// TestStartFlood: each start of a device takes the kernel's lock of network configuration; a driver gets a
// bounded number of them, and its other requests are answered meanwhile.
func TestStartFlood(t *testing.T) {
	pace := unpaced
	pace.Starts = session.Rate{Every: 100 * time.Millisecond, Burst: 3}
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	r := newPacedRig(t, spec, 0, pace)
	begin, rounds := time.Now(), uint64(0)
	for ; time.Since(begin) < 600*time.Millisecond || r.count("throttled") == 0 && time.Since(begin) < 20*time.Second; rounds++ {
		r.bringUp(plain)
	}
	if n, most := r.dev().Counters["starts"], 4+uint64(time.Since(begin)/pace.Starts.Every); n != rounds || n > most {
		t.Errorf("%d rounds, %d starts, at most %d may be", rounds, n, most)
	}
	if r.count("throttled") == 0 || r.Downs != 0 {
		t.Errorf("throttled %d times, down %d times", r.count("throttled"), r.Downs)
	}
	r.works()
}

// TestBackoff: an agent that breaks the link as soon as it is up meets longer and longer waits, and is met again
// when it behaves.
func TestBackoff(t *testing.T) {
	t.Parallel()
	pace := unpaced
	pace.Breaks = session.Rate{Every: 50 * time.Millisecond, Burst: 20} // 5 breaks
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	r := newPacedRig(t, spec, 0, pace)
	begin, ups := time.Now(), uint64(0)
	for time.Since(begin) < 700*time.Millisecond || r.count("backoffs") < 2 && time.Since(begin) < 20*time.Second {
		r.Step()
		if n := r.count("link_ups"); n > ups && r.Up && r.Link.Reset() {
			ups, r.Up = n, false
			r.Link.Quiesced()
		}
	}
	// 6 at once. Then each one waits, for 100 ms at least, or uses up what comes back in 200 ms.
	if n, most := r.count("link_ups"), 7+uint64(time.Since(begin)/(100*time.Millisecond)); n < 5 || n > most {
		t.Errorf("the link was up %d times in %v, at most %d may be", n, time.Since(begin), most)
	}
	if n := r.count("backoffs"); n < 2 {
		t.Errorf("%d waits", n)
	}
	if !strings.Contains(r.log.String(), "again and again") {
		t.Error("the log tells nothing")
	}
	r.WaitUp()
	// What it did is forgotten after a while.
	r.For(1200 * time.Millisecond)
	backoffs := r.count("backoffs")
	for i := 0; i < 3; i++ {
		r.Link.Reset()
		r.Up = false
		r.Link.Quiesced()
		r.WaitUp()
	}
	if n := r.count("backoffs"); n != backoffs {
		t.Errorf("%d more waits after it behaved", n-backoffs)
	}
}

// TestRestartsAreNotSlowed: processes of the other side that end and start again are no peer that breaks the
// link on purpose.
func TestRestartsAreNotSlowed(t *testing.T) {
	t.Parallel()
	spec := newLoopback(t)
	r := newPacedRig(t, spec, 0, session.Pace{})
	for i := 0; i < 70; i++ { // as breaks, 50 would be too many
		ups := r.count("link_ups")
		r.B.Close()
		r.Peer = peer.New(t, spec, board.Agent)
		r.Until(20*time.Second, "the link is up again", func() bool { return r.Up && r.count("link_ups") > ups })
	}
	if n := r.count("backoffs"); n != 0 {
		t.Errorf("%d waits", n)
	}
}
