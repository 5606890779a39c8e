package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/status"
)

// TestStatusState: the state of a link, and what led to it.
func TestStatusState(t *testing.T) {
	var out bytes.Buffer
	(&statusCmd{}).print(&streams{out: &out}, &status.Program{Side: "host", Links: []status.Link{
		{Name: "a", Board: "loopback:/a", State: "waiting for the peer", Reason: "no heartbeat", Since: "then"},
		{Name: "b", Board: "loopback:/b", State: "up", Since: "now"},
	}})
	got := strings.Join(strings.Fields(out.String()), " ")
	for _, want := range []string{"link a loopback:/a: waiting for the peer: no heartbeat (since then)", "link b loopback:/b: up (since now)"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
}
