package main

import (
	"testing"
	"time"

	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
)

// TestMachineIdentity: both ends' MAC addresses follow the machine, the board and the name: others on another
// machine, the same after a restart.
func TestMachineIdentity(t *testing.T) {
	netnstest.Need(t)
	t.Parallel()
	h := newHand(t)
	base := h.arg["host"]
	h.begin("serve")
	h.begin("agent")
	seen := map[string]string{}
	for _, id := range []string{"carrier A", "carrier B", "carrier A"} {
		m, err := app.Identify(id)
		if err != nil {
			t.Fatal(err)
		}
		spec := "loopback:" + h.path("b")
		host, agent := m.MAC("board0", board.Host, spec, 0).String(), m.MAC("board0", board.Agent, spec, 0).String()
		h.arg["host"] = append(append([]string{}, base...), "--machine-id", id)
		h.begin("host")
		until(t, 8*time.Second, "the addresses of "+id, func() bool {
			return h.isUp("host") && h.isUp("agent") && h.status("agent").Devices[0].MAC == agent
		})
		if got := h.status("host").Devices[0].MAC; got != host {
			t.Errorf("%s: the host has %s, want %s", id, got, host)
		}
		for side, mac := range map[string]string{"host": host, "agent": agent} {
			if o, ok := seen[mac]; ok && o != id+side {
				t.Errorf("%s is the address of %s and of %s", mac, o, id+side)
			}
			seen[mac] = id + side
		}
		h.stop("host")
	}
	if len(seen) != 4 {
		t.Errorf("%d addresses, want 4: %v", len(seen), seen)
	}
}
