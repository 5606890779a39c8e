package trial_test

import (
	"slices"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial"
)

// A source of entropy beside a network: the agent asks, also after the host was killed, and neither takes memory or doorbells from
// the other.
func TestEntropy(t *testing.T) {
	r := start(t, trial.Config{HostArgs: []string{"--rng=rate=1G"}, AgentArgs: []string{"--rng=every=1ms", "--class=control"}})
	rng := func(s board.Side) (found status.Device) {
		for _, d := range getStatus(t, r, s).Links[0].Devices {
			if d.Type == "entropy" {
				found = d
			}
		}
		return found
	}
	more := func() {
		t.Helper()
		from := rng(board.Agent).Counters["requests"]
		for begin := time.Now(); rng(board.Agent).Counters["requests"] < from+20; time.Sleep(5 * time.Millisecond) {
			if time.Since(begin) > 20*time.Second {
				t.Fatalf("no more than %d requests: %+v", from, rng(board.Agent))
			}
		}
	}
	more()
	r.Kill(board.Host)
	if err := r.StartSide(board.Host); err != nil {
		t.Fatal(err)
	}
	waitUp(t, r)
	more()
	h, a := rng(board.Host), rng(board.Agent)
	if a.Counters["bytes"] != 64*a.Counters["requests"] || a.Counters["bits"] != 0 || a.Interface != "/dev/urandom" || a.Number != 100 {
		t.Errorf("agent: %+v", a)
	}
	if h.Counters["bytes"] != 64*h.Counters["requests"] || h.Counters["broken"] != 0 || h.Status != "ACKNOWLEDGE|DRIVER|FEATURES_OK|DRIVER_OK" {
		t.Errorf("host: %+v", h)
	}
	if net := getStatus(t, r, board.Agent).Links[0].Devices[0]; h.Class != "bulk" || a.Class != "bulk" || net.Class != "control" {
		t.Errorf("classes %q, %q, and %q of the network, want bulk, bulk and control", h.Class, a.Class, net.Class)
	}
	for _, f := range []string{"version_1", "event_idx"} {
		if !slices.Contains(a.Negotiated, f) || !slices.Contains(h.Negotiated, f) {
			t.Errorf("%s is not negotiated: %v, %v", f, a.Negotiated, h.Negotiated)
		}
	}
	if h.Queues[0].Doorbell["rescued"] != 0 && h.Queues[0].Doorbell["wakeups"] == 0 {
		t.Errorf("the doorbell does not work: %v", h.Queues[0].Doorbell)
	}
}
