package tunbridge

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// State is an interface as it is at a moment.
type State struct {
	Name  string
	Index int  // in the network namespace that it is in
	MTU   int  // bytes
	Up    bool // administratively (IFF_UP)
	// Moved: it is not in the network namespace that it was opened in.
	Moved bool
	// Elsewhere: it is in a network namespace that this program may not enter. MTU and Up are what was known last.
	Elsewhere bool
	// Gone: somebody removed it. The other fields are what was known last. Remake makes it again.
	Gone bool
	// Lapses counts how often it was seen down, or with an MTU below MinMTU6: then the kernel drops its IPv6 addresses. With a Watch
	// none is missed, however soon it was undone.
	Lapses int
	// Made counts how often it was made: 1 after Open, one more after each Remake.
	Made int
}

// State asks for the interface's state.
func (it *Iface) State() State {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	return it.state()
}

// state is State. mu is held.
func (it *Iface) state() State {
	defer it.leave()
	err := it.ask(func() error {
		if err := it.getMTU(); err != nil {
			return err
		}
		r := newIfreq(it.name)
		err := ioctlIfreq(it.ctl, unix.SIOCGIFFLAGS, r)
		if err == nil {
			it.isUp = *r.u16()&unix.IFF_UP != 0
		}
		return err
	})
	if it.typ == TAP && it.fd >= 0 {
		_ = it.getMAC() // remembered for Remake; else what we knew
	}
	it.noteLapse(it.isUp, it.mtu)
	return State{Name: it.name, Index: it.Index(), MTU: it.mtu, Up: it.isUp, Moved: it.at.id != it.at.homeID, Made: 1 + it.remakes, Lapses: it.lapses,
		Elsewhere: errors.Is(err, ErrElsewhere), Gone: errors.Is(err, ErrGone)}
}

// noteLapse counts a lapse that begins. mtu is 0 where it is unknown. mu is held.
func (it *Iface) noteLapse(up bool, mtu int) {
	lapse := !up || mtu != 0 && mtu < MinMTU6
	if lapse && !it.lapsed {
		it.lapses++
	}
	it.lapsed = lapse
}

// The watcher looks by itself after watchPoll where the kernel tells of changes, and after watchBlind where it does
// not. Changes within watchPause are seen as one.
const (
	watchPoll  = 10 * time.Second
	watchBlind = time.Second
	watchPause = 20 * time.Millisecond
)

// watch is the goroutine that notices what becomes of an interface.
type watch struct {
	it   *Iface
	done chan struct{} // closed when the goroutine has ended

	mu     sync.Mutex
	funcs  []func(State)
	file   *os.File      // a netlink socket in the namespace id, nil where there is none
	nudged chan struct{} // capacity 1: look now
	closed bool
	id     netnsID
}

// Watch has f called with the state of the interface after each change of it, from now until Close, which waits for a call
// under way. The calls come from one goroutine, soon after a change; changes that follow each other closely are seen as one. f must not call
// Close. Watch works without privileges; where the kernel does not tell of changes, or the interface was moved to another network namespace, they are noticed within a second.
func (it *Iface) Watch(f func(State)) {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	if it.fd < 0 {
		return
	}
	if it.watch != nil {
		it.watch.mu.Lock()
		it.watch.funcs = append(it.watch.funcs, f)
		it.watch.mu.Unlock()
		return
	}
	w := &watch{it: it, done: make(chan struct{}), funcs: []func(State){f}, nudged: make(chan struct{}, 1)}
	it.watch = w
	atomic.StoreInt32(&it.watched, 1)
	w.open(it.at.id, it.openNetns())
	go w.run(it.state())
}

// unwatch ends the watching. mu is not held.
func (it *Iface) unwatch() {
	it.mu.Lock()
	w := it.watch
	it.watch = nil
	atomic.StoreInt32(&it.watched, 0)
	it.mu.Unlock()
	if w == nil {
		return
	}
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.nudge()
	<-w.done
}

// nudge has the watcher look now.
func (w *watch) nudge() {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case w.nudged <- struct{}{}:
	default:
	}
	if w.file != nil {
		w.file.SetReadDeadline(time.Now())
	}
}

// open makes the socket of the namespace that netns refers to and closes netns; without one, the thread's. Away from home there is
// none: it would keep alive a namespace that its owner has left. Iface.mu is held.
func (w *watch) open(id netnsID, netns int) {
	var f *os.File
	err := errors.New("no namespace")
	listen := func() (err error) {
		f, err = linkSocket()
		return err
	}
	cur, here := openThreadNetns()
	if cur >= 0 {
		unix.Close(cur)
	}
	if id != w.it.at.homeID {
	} else if here == id {
		err = listen()
	} else if netns >= 0 {
		err = inNetns(netns, listen)
	}
	if netns >= 0 {
		unix.Close(netns)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file != nil {
		w.file.Close()
	}
	w.file, w.id = nil, id
	if err == nil {
		w.file = f
	}
}

// linkSocket makes a netlink socket that hears of the interfaces of the thread's network namespace.
func linkSocket() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}

func (w *watch) run(last State) {
	defer close(w.done)
	defer func() {
		w.mu.Lock()
		if w.file != nil {
			w.file.Close()
			w.file = nil
		}
		w.mu.Unlock()
	}()
	buf := make([]byte, 16<<10)
	for {
		w.catchUp(buf)
		s, moved := w.look()
		w.mu.Lock()
		closed, funcs := w.closed, w.funcs
		w.mu.Unlock()
		if closed {
			return
		}
		if s != last {
			for _, f := range funcs {
				f(s)
			}
			last = s
		}
		if moved {
			continue // changes since then may have been missed
		}
		w.wait(buf, s.Gone || s.Elsewhere)
	}
}

// look returns the state, and whether the watcher followed the interface to another namespace.
func (w *watch) look() (s State, moved bool) {
	it := w.it
	it.mu.Lock()
	defer it.mu.Unlock()
	if it.fd < 0 {
		return State{}, false
	}
	s = it.state()
	if it.at.id != w.id {
		w.open(it.at.id, it.openNetns())
		return s, true
	}
	return s, false
}

// wait returns when there may be something new.
func (w *watch) wait(buf []byte, blind bool) {
	w.mu.Lock()
	f := w.file
	d := watchPoll
	if f == nil || blind {
		d = watchBlind
	}
	if f != nil {
		select {
		case <-w.nudged: // before the deadline was set
			w.mu.Unlock()
			return
		default:
		}
		f.SetReadDeadline(time.Now().Add(d))
	}
	w.mu.Unlock()
	if f == nil {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-w.nudged:
		case <-t.C:
		}
		return
	}
	for {
		n, err := f.Read(buf)
		if err != nil {
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
			case errors.Is(err, unix.ENOBUFS):
				w.missed()
				w.pause(w.nudged)
			default: // of no use any more: look by the clock
				w.mu.Lock()
				w.file.Close()
				w.file = nil
				w.mu.Unlock()
			}
			return
		}
		if w.concerns(buf[:n]) {
			w.pause(w.nudged)
			return
		}
	}
}

// maxCatchUp limits how many messages are read before the watcher looks.
const maxCatchUp = 1000

// catchUp reads the messages that are there already: what they tell is older than what a look finds.
func (w *watch) catchUp(buf []byte) {
	w.mu.Lock()
	f := w.file
	if f != nil {
		f.SetReadDeadline(time.Time{}) // a nudge stays in nudged
	}
	w.mu.Unlock()
	if f == nil {
		return
	}
	c, err := f.SyscallConn()
	for i := 0; err == nil && i < maxCatchUp; i++ {
		n, rerr := 0, error(nil)
		err = c.Read(func(fd uintptr) bool {
			n, rerr = unix.Read(int(fd), buf)
			return true // do not wait
		})
		switch {
		case rerr == unix.ENOBUFS:
			w.missed()
		case rerr == unix.EINTR:
		case rerr != nil || n <= 0:
			return
		default:
			w.concerns(buf[:n])
		}
	}
}

// missed notes that the kernel had no room for messages: a lapse may have been among them.
func (w *watch) missed() {
	w.it.mu.Lock()
	w.it.lapses++
	w.it.mu.Unlock()
}

// pause lets changes that follow each other closely come together.
func (w *watch) pause(nudged <-chan struct{}) {
	t := time.NewTimer(watchPause)
	defer t.Stop()
	select {
	case <-nudged:
	case <-t.C:
	}
}

// concerns tells whether a message about links (rtnetlink(7)) is about this one. It notes lapses, and that the
// interface left the namespace.
func (w *watch) concerns(b []byte) bool {
	const need = unix.SizeofNlMsghdr + unix.SizeofIfInfomsg
	for len(b) >= need {
		var h unix.NlMsghdr
		var i unix.IfInfomsg
		copy((*[unix.SizeofNlMsghdr]byte)(unsafe.Pointer(&h))[:], b)
		copy((*[unix.SizeofIfInfomsg]byte)(unsafe.Pointer(&i))[:], b[unix.SizeofNlMsghdr:])
		if h.Len < need || int64(h.Len) > int64(len(b)) {
			return true // cut short: look
		}
		if int(i.Index) == w.it.Index() {
			if i.Family != unix.AF_UNSPEC { // a bridge's
				return true
			}
			w.it.mu.Lock()
			switch {
			case w.it.at.id != w.id: // from before it was followed
			case h.Type == unix.RTM_DELLINK:
				w.it.at.left = true
			case h.Type == unix.RTM_NEWLINK:
				w.it.noteLapse(i.Flags&unix.IFF_UP != 0, linkMTU(b[need:h.Len]))
			}
			w.it.mu.Unlock()
			return true
		}
		n := (int(h.Len) + 3) &^ 3
		if n > len(b) {
			return false
		}
		b = b[n:]
	}
	return false
}

// linkMTU returns the MTU among the attributes of a link's message, 0 if it is not there.
func linkMTU(attrs []byte) (mtu int) {
	eachAttr(attrs, func(typ uint16, v []byte) {
		if typ == unix.IFLA_MTU && len(v) >= 4 {
			var n uint32
			copy((*[4]byte)(unsafe.Pointer(&n))[:], v)
			mtu = int(n)
		}
	})
	return mtu
}
