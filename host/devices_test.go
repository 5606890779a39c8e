package host_test

import (
	"context"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/hwtest/echo"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
)

// deviceEvents takes the EVENT_DEVICE that came in.
func (r *rig) deviceEvents() (es []virtiomsg.DeviceEvent) {
	for i := range r.Events {
		var e virtiomsg.DeviceEvent
		if e.Decode(&r.Events[i]) == nil {
			es = append(es, e)
		}
	}
	r.Events = nil
	return es
}

// TestDevicesBehindFullFIFO: an agent that takes no messages holds up neither those who add and remove devices nor the link; what it is owed
// then is, for each number, a removal before the state after it.
func TestDevicesBehindFullFIFO(t *testing.T) {
	t.Parallel()
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	r := newRig(t, spec)
	r.Mute = true
	const numbers = 50
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		do := func() error {
			for round := range 3 { // more events than the FIFO has room for
				for n := uint16(100); n < 100+numbers; n++ {
					if err := r.link.AddDevice(ctx, n, &echo.Device{}); err != nil {
						return err
					}
				}
				for n := uint16(100); n < 100+numbers; n++ {
					if round == 2 && n%2 == 0 {
						continue // stays
					}
					if err := r.link.RemoveDevice(ctx, n); err != nil {
						return err
					}
				}
			}
			return nil
		}
		done <- do()
	}()
	var err error
	r.Until(40*time.Second, "devices come and go", func() bool {
		select {
		case err = <-done:
			return true
		default:
			return false
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(r.link.Status().Devices); n != 1+numbers/2 {
		t.Errorf("%d devices are left, want %d", n, 1+numbers/2)
	}
	r.Mute = false
	last, events := map[uint16]uint16{}, 0
	r.Until(20*time.Second, "all events come", func() bool {
		for _, e := range r.deviceEvents() {
			if last[e.Dev] == virtiomsg.DeviceReady && e.State == virtiomsg.DeviceReady {
				t.Errorf("device %d is ready twice, and was not removed in between", e.Dev)
			}
			last[e.Dev] = e.State
			events++
		}
		for n := uint16(100); n < 100+numbers; n++ {
			want := uint16(virtiomsg.DeviceRemoved)
			if n%2 == 0 {
				want = virtiomsg.DeviceReady
			}
			if last[n] != want {
				return false
			}
		}
		return true
	})
	if most := 2*3*numbers - numbers/2; events > most || events < 2*numbers {
		t.Errorf("%d events, want %d to %d", events, 2*numbers, most)
	}
	if r.Downs != 0 || r.count("link_ups") != 1 || r.dev().Name != "net0" {
		t.Errorf("down %d times, up %d times, the first device is %q", r.Downs, r.count("link_ups"), r.dev().Name)
	}
}

// TestRemoveFromDeadAgent: a device whose agent does nothing any more is removed at once, and while the link is down as well.
func TestRemoveFromDeadAgent(t *testing.T) {
	t.Parallel()
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	r := newRig(t, spec)
	r.bringUp(virtio.FeaturesOf(virtio.Version1))
	ctx := context.Background()
	if err := r.link.AddDevice(ctx, 9, &echo.Device{}); err != nil { // nobody steps the agent from here on
		t.Fatal(err)
	}
	if err := r.link.RemoveDevice(ctx, dev); err != nil {
		t.Fatal(err)
	}
	if ds := r.link.Status().Devices; len(ds) != 1 || ds[0].Name != "echo0" {
		t.Errorf("the devices left are %+v", ds)
	}
	if err := r.net.Interface().SetCarrier(true); err == nil {
		t.Error("the interface of a removed device is still open")
	}
	for begin := time.Now(); r.link.Status().State == "up"; time.Sleep(time.Millisecond) { // 200 beats of 10 ms
		if time.Since(begin) > 30*time.Second {
			t.Fatal("the agent's silence is not noticed")
		}
	}
	if err := r.link.RemoveDevice(ctx, 9); err != nil {
		t.Fatal(err)
	}
	if n := len(r.link.Status().Devices); n != 0 {
		t.Errorf("%d devices are left, want none", n)
	}
	r.WaitUp()
}
