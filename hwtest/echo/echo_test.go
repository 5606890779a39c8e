package echo_test

import (
	"context"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/hwtest/echo"
	"github.com/boardlink/boardlink/hwtest/peer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A device model and a driver of their own folder run over virtio-msg, in both placements, through restarts of either end.
func TestEcho(t *testing.T) {
	for _, placement := range []string{"window", "push"} {
		t.Run(placement, func(t *testing.T) {
			t.Parallel()
			var log peer.Log
			_, spec := peer.NewBoard(t, testboard.PairOptions{})
			drv := &echo.Driver{}
			run := func(side string, key byte) (stop func()) {
				ctx, cancel := context.WithCancel(context.Background())
				done := make(chan error, 1)
				const beat = 10 * time.Millisecond
				if side == "host" {
					l := host.NewLink(host.Config{Name: "h", Board: spec, Devices: map[uint16]device.Device{7: &echo.Device{}}, Log: &log, Beat: beat, LostBeats: 200})
					go func() { done <- l.Run(ctx) }()
				} else {
					drv = &echo.Driver{Dev: 7, Key: key}
					l := agent.NewLink(agent.Config{Name: "a", Board: spec, Placement: placement, Devices: []driver.Driver{drv}, Log: &log, Beat: beat, LostBeats: 200})
					go func() { done <- l.Run(ctx) }()
				}
				return func() {
					cancel()
					if err := <-done; err != nil {
						t.Errorf("%s: %v", side, err)
					}
				}
			}
			echoes := func() {
				t.Helper()
				from := drv.Echoed()
				for begin := time.Now(); drv.Echoed() < from+50; time.Sleep(time.Millisecond) {
					if time.Since(begin) > 30*time.Second {
						t.Fatalf("%d answers; log:\n%s", drv.Echoed()-from, &log)
					}
				}
			}
			stopHost, stopAgent := run("host", 0), run("agent", 0x5a)
			echoes()
			stopHost()
			stopHost = run("host", 0)
			echoes()
			stopAgent()
			stopAgent = run("agent", 0xa5)
			echoes()
			stopAgent()
			stopHost()
		})
	}
}
