package agent_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
)

// TestInFlight: a host that always has a request of its own in flight, through FIFOs of one slot or a few, gets its
// answers, and the agent comes up at the same time.
func TestInFlight(t *testing.T) {
	for _, slots := range []uint32{1, 2} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, func(r *rig) { r.slots = slots })
			r.WaitUp()
			pings, token := 0, r.Token()
			r.Until(20*time.Second, "the device comes up", func() bool {
				var m virtiomsg.Slot
				virtiomsg.EncodePing(&m, token, 7)
				if r.Up && r.Link.Send(&m) == nil {
					pings++
					token = r.Token()
				}
				return r.dev().Carrier && r.status&virtio.StatusDriverOK != 0 && pings > 100
			})
			r.Until(20*time.Second, "all pings are answered", func() bool { return len(r.Answers) == pings })
			if r.Downs != 0 || r.count("failures") != 0 || r.count("call_timeout") != 0 || r.running != 1 {
				t.Errorf("down %d times, %d failures, %d time-outs, brought up %d times", r.Downs, r.count("failures"), r.count("call_timeout"), r.running)
			}
		})
	}
}

// TestLinkDown: where the device's status says that the link is down, the interface has no carrier (virtio 1.2, 5.1.5),
// when the device comes up and later.
func TestLinkDown(t *testing.T) {
	r := newRig(t, func(r *rig) { r.config.LinkUp = false })
	r.Until(20*time.Second, "the device comes up", func() bool { return r.count("bring_ups") == 1 })
	r.For(30 * time.Millisecond)
	if r.dev().Carrier {
		t.Error("the carrier is on at bring-up")
	}
	for _, up := range []bool{true, false, true} {
		r.config.LinkUp = up
		r.event(r.status)
		r.Until(20*time.Second, "the carrier follows", func() bool { return r.dev().Carrier == up })
	}
	if r.Downs != 0 || r.running != 1 {
		t.Errorf("down %d times, brought up %d times", r.Downs, r.running)
	}
	// A host that does not offer the status has a link that is up.
	r = newRig(t, func(r *rig) { r.offered.Clear(virtio.NetStatus); r.config.LinkUp = false })
	r.waitRunning()
}

// TestChangesAreDamped: however often a host changes the configuration, who listens to the interface hears of about ten
// changes a second, and of the last one.
func TestChangesAreDamped(t *testing.T) {
	r := newRig(t, func(r *rig) { r.pace = session.Pace{} })
	r.waitRunning()
	begin, before, events := time.Now(), r.count("changes"), 0
	for time.Since(begin) < 500*time.Millisecond || uint64(events) < 4*(r.count("changes")-before) && time.Since(begin) < 20*time.Second {
		r.config.LinkUp = !r.config.LinkUp
		r.config.MAC[5]++
		r.event(r.status)
		r.Step()
		events++
	}
	n, most := r.count("changes")-before, 3+uint64(time.Since(begin)/(100*time.Millisecond))
	if n > most || n == 0 || uint64(events) < 4*n {
		t.Errorf("%d changes of %d applied, at most %d may be", n, events, most)
	}
	r.config.LinkUp = true
	r.event(r.status)
	r.Until(20*time.Second, "the last change is applied", func() bool {
		return r.dev().Carrier && r.ifc.MAC() == tunbridge.MAC(r.config.MAC)
	})
	if r.count("damped")+r.count("merged") == 0 || r.Downs != 0 || r.running != 1 {
		t.Errorf("%d damped, %d merged, down %d times, brought up %d times", r.count("damped"), r.count("merged"), r.Downs, r.running)
	}
}
