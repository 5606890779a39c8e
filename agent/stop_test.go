package agent_test

import (
	"testing"
	"time"

	"github.com/boardlink/boardlink/virtiomsg"
)

// TestStopDuringBringUp: an agent that waits for an answer that never comes stops without waiting for it, whatever it has asked for.
func TestStopDuringBringUp(t *testing.T) {
	for _, id := range []uint8{virtiomsg.GetDeviceInfo, virtiomsg.GetDeviceFeatures, virtiomsg.SetDriverFeatures, virtiomsg.GetConfig,
		virtiomsg.SetVQueue, virtiomsg.SetDeviceStatus} {
		t.Run(virtiomsg.MessageName(false, id), func(t *testing.T) {
			t.Parallel()
			asked := false
			r := newRig(t, func(r *rig) {
				r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool {
					if h.Bus() || h.ID != id {
						return true
					}
					asked = true
					return false
				}
			})
			r.Until(20*time.Second, "the agent asks", func() bool { return asked })
			r.stop()
			ended := false
			r.Until(20*time.Second, "the agent ends", func() bool {
				select {
				case err := <-r.done:
					if err != nil {
						t.Error(err)
					}
					r.done <- nil
					ended = true
				default:
				}
				return ended
			})
			if n := r.count("call_timeout"); n != 0 {
				t.Errorf("%d requests were waited for to their time-out", n)
			}
		})
	}
}
