package ifaddr

import (
	"testing"
	"time"

	"github.com/boardlink/boardlink/tunbridge"
	"github.com/vishvananda/netlink"
)

// deviceOf is a Device that nobody uses.
type deviceOf struct{ *tunbridge.Iface }

func (d deviceOf) Interface() *tunbridge.Iface { return d.Iface }

// noLog is a session.Logger.
type noLog struct{}

func (noLog) Debug(string, ...interface{}) {}
func (noLog) Info(string, ...interface{})  {}
func (noLog) Warn(string, ...interface{})  {}
func (noLog) Error(string, ...interface{}) {}

// TestKeepAtOnce: addresses that the kernel removed come back also where the interface looks as before when somebody looks: down and
// up again, or an MTU too small for IPv6 and the old one, within less than a millisecond.
func TestKeepAtOnce(t *testing.T) {
	it := open(t, tunbridge.TAP)
	addrs := prefixes("10.9.0.1/24", "fd09::1/64")
	if err := SetUp(it, addrs, 0, noLog{}); err != nil {
		t.Fatal(err)
	}
	k := Keep(KeepConfig{Device: deviceOf{it}, Addrs: addrs, Log: noLog{}})
	defer k.Close()
	l, err := netlink.LinkByName("t0")
	if err != nil {
		t.Fatal(err)
	}
	for i, change := range []func() (error, error){
		func() (error, error) { return netlink.LinkSetDown(l), netlink.LinkSetUp(l) },
		func() (error, error) {
			return netlink.LinkSetMTU(l, tunbridge.MinMTU6-1), netlink.LinkSetMTU(l, 1500)
		},
	} {
		if done, undone := change(); done != nil || undone != nil {
			t.Fatal(done, undone)
		}
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			f, ok := addresses(t)["fd09::1/64"]
			if ok && f&unusable == 0 {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("change %d: the interface has only %v", i, addresses(t))
			}
		}
	}
}
