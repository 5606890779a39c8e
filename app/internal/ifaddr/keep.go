package ifaddr

import (
	"errors"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/tunbridge"
)

// SetUp gives an interface that was just opened its addresses and sets it up. Addresses that wait for the MTU are a warning, unless
// mtu, which the operator asked for (0: none), is what keeps them away. So is what may not be done to an
// interface that somebody else made.
func SetUp(it *tunbridge.Iface, addrs []netip.Prefix, mtu int, log session.Logger) error {
	err := Apply(it, addrs)
	if _, ok := err.(*MTUError); ok && (mtu == 0 || mtu >= tunbridge.MinMTU6) {
		log.Warn("the interface lacks addresses for now", "interface", it.Name(), "error", err)
		err = nil
	}
	if err != nil {
		return err
	}
	err = Up(it)
	if err != nil && it.Attached() && errors.Is(err, unix.EPERM) {
		log.Warn("the interface stays down", "interface", it.Name(), "error", err)
		err = nil
	}
	return err
}

// Device is a device with an interface that can be made again.
type Device interface {
	Interface() *tunbridge.Iface
	// Remake makes the interface again that somebody removed. The error matches tunbridge.ErrInUse while
	// the device has not let go of the removed one.
	Remake() error
}

// A removed interface is made again after retryMin, and after an error then twice as long, up to retryMax. Refusals for want of
// privileges are final after maxRefusals of them, unless the program goes on with other boards.
const (
	retryInUse  = 20 * time.Millisecond
	retryMin    = 50 * time.Millisecond
	retryMax    = 5 * time.Second
	maxRefusals = 6
)

// KeepConfig says how a Keeper looks after an interface.
type KeepConfig struct {
	Device Device
	Addrs  []netip.Prefix // the interface is to have these, in the network namespace that it was opened in
	Log    session.Logger
	// Lost, if not nil, is called once, on a goroutine of the Keeper, when the interface was removed and may not be made
	// again. Nil: it is tried again for ever.
	Lost func(error)
}

// Keeper puts back what an interface is to have, whoever takes it away: its addresses when it is set up again or its MTU allows
// IPv6 again, and the interface itself when it is removed. An interface that somebody sets down stays down.
type Keeper struct {
	cfg     KeepConfig
	changes chan struct{} // capacity 1
	stop    chan struct{}
	done    chan struct{}
	once    sync.Once

	mu  sync.Mutex
	now tunbridge.State
}

// Keep starts a Keeper of an interface that is set up. Close ends it; the interface may be closed before.
func Keep(cfg KeepConfig) *Keeper {
	k := &Keeper{cfg: cfg, changes: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	it := cfg.Device.Interface()
	it.Watch(k.changed)
	first := it.State() // after Watch: a change since then is told
	go k.run(first)
	return k
}

// Close ends the Keeper, after a call of Device.Remake that is under way.
func (k *Keeper) Close() {
	k.once.Do(func() { close(k.stop) })
	<-k.done
}

func (k *Keeper) changed(s tunbridge.State) {
	k.mu.Lock()
	k.now = s
	k.mu.Unlock()
	select {
	case k.changes <- struct{}{}:
	default:
	}
}

func (k *Keeper) run(last tunbridge.State) {
	defer close(k.done)
	for {
		if last.Gone && !k.remake(last) {
			return
		}
		select {
		case <-k.stop:
			return
		case <-k.changes:
		}
		k.mu.Lock()
		now := k.now
		k.mu.Unlock()
		k.follow(last, now)
		last = now
	}
}

// follow puts addresses back after a change. Who moves the interface to another namespace configures it there.
func (k *Keeper) follow(last, now tunbridge.State) {
	if now.Moved != last.Moved || now.Elsewhere && !last.Elsewhere {
		k.cfg.Log.Warn("the interface was moved to another network namespace, or back", "interface", now.Name, "moved", now.Moved, "out_of_reach", now.Elsewhere)
	}
	up := now.Up && !last.Up
	mtu := now.MTU >= tunbridge.MinMTU6 != (last.MTU >= tunbridge.MinMTU6)
	lapsed := now.Lapses != last.Lapses // down and up again before anybody looked
	back := last.Moved && !now.Moved
	if now.Gone || now.Moved || now.Elsewhere || !now.Up || !up && !mtu && !lapsed && !back {
		return
	}
	k.apply()
}

func (k *Keeper) apply() {
	it := k.cfg.Device.Interface()
	err := Apply(it, k.cfg.Addrs)
	if err != nil && !errors.Is(err, tunbridge.ErrGone) && !errors.Is(err, tunbridge.ErrClosed) {
		k.cfg.Log.Warn("the interface lacks addresses for now", "interface", it.Name(), "error", err)
	}
}

// remake makes the interface again, sooner or later; false where that is over.
func (k *Keeper) remake(last tunbridge.State) bool {
	it := k.cfg.Device.Interface()
	k.cfg.Log.Warn("somebody removed the interface: making it again", "interface", last.Name)
	wait, refusals, logged := retryMin, 0, ""
	for {
		err := k.cfg.Device.Remake()
		if err == nil {
			err = SetUp(it, k.cfg.Addrs, 0, k.cfg.Log)
		}
		d := wait
		switch {
		case err == nil:
			k.cfg.Log.Info("interface made again", "interface", it.Name(), "addresses", k.cfg.Addrs)
			return true
		case errors.Is(err, tunbridge.ErrClosed):
			return false
		case errors.Is(err, tunbridge.ErrInUse):
			d = retryInUse
		default:
			if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
				if refusals++; refusals >= maxRefusals && k.cfg.Lost != nil {
					k.cfg.Lost(err)
					return false
				}
			}
			if wait *= 2; wait > retryMax {
				wait = retryMax
			}
			if s := err.Error(); s != logged {
				logged = s
				k.cfg.Log.Warn("the interface cannot be made again, it is tried on", "interface", last.Name, "error", err)
			}
		}
		t := time.NewTimer(d)
		select {
		case <-k.stop:
			t.Stop()
			return false
		case <-t.C:
		}
	}
}
