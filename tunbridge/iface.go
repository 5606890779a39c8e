package tunbridge

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Iface is an open tap or tun device.
//
// One goroutine may read, one may write and others may call the methods that set and
// get, all at the same time. Close must follow the last Read, ReadV, Write and WriteV: their
// goroutines have ended. The descriptor never blocks: wait with poll on FD.
//
// With several queues each is an Iface (see Queue), which one goroutine may read and one may write.
type Iface struct {
	fd        int
	first     *Iface // queue 0, which has what belongs to the interface
	multi     bool   // it was made with IFF_MULTI_QUEUE
	hdrLen    int
	typ       LinkType
	supported Offload
	index     int32 // atomic
	known     int32 // the MTU that was seen last; atomic
	watched   int32 // not 0: a watcher keeps known up to date; atomic
	warnings  []string
	attached  bool
	cfg       Config // as Open got it

	mu   sync.Mutex // guards what follows, and fd against Close
	ctl  int        // a socket in the network namespace at.id; -1 between requests where that is not home
	at   place
	name string
	made string // the name that Open gave it
	mac  MAC
	mtu  int
	isUp bool // as it was seen last

	lapses int  // State.Lapses
	lapsed bool // one has begun and not ended

	watch   *watch // nil until Watch
	remakes int

	queues []*Iface // of the first: all of them
	inUse  int      // of them, from the first on
}

func (it *Iface) warn(format string, args ...interface{}) {
	w := fmt.Sprintf(format, args...)
	if n := len(it.warnings); n == 0 || it.warnings[n-1] != w {
		it.warnings = append(it.warnings, w)
	}
}

// tolerate makes a warning of a refusal for want of privileges, where the interface was there before: somebody
// made it for a program without them.
func (it *Iface) tolerate(err error, format string, args ...interface{}) error {
	if err == nil || !it.attached || !errors.Is(err, unix.EPERM) {
		return err
	}
	it.warn("not permitted to change the interface (CAP_NET_ADMIN is missing): "+format, args...)
	return nil
}

// failed wraps the errno of a request about the interface; EBADFD, which a tun descriptor without an
// interface answers, as ErrGone.
func (it *Iface) failed(op string, err error) error {
	if err == unix.EBADFD {
		err = ErrGone
	}
	return fmt.Errorf("tunbridge: interface %q: %s: %w", it.name, op, err)
}

// Name returns the interface's name; it follows a renaming.
func (it *Iface) Name() string {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	if it.fd >= 0 {
		_ = it.refresh() // else what we knew
	}
	return it.name
}

// Index returns the interface's index in the network namespace that it is in, as it was known last.
func (it *Iface) Index() int { return int(atomic.LoadInt32(&it.index)) }

// Type returns the kind of the interface.
func (it *Iface) Type() LinkType { return it.typ }

// FD returns the descriptor, to poll: readable when a frame is there. It never blocks.
func (it *Iface) FD() int { return it.fd }

// HeaderLen returns how many bytes of virtio-net header each frame starts with:
// 12 in vnet mode, 0 in plain mode.
func (it *Iface) HeaderLen() int { return it.hdrLen }

// Attached tells whether Open found the interface, instead of creating it.
func (it *Iface) Attached() bool { return it.attached }

// Warnings returns what Open could not do and did without, a line each.
func (it *Iface) Warnings() []string { return it.first.warnings }

// OffloadSupported returns what SetOffload takes, and what frames written may leave to the
// kernel: nothing in plain mode.
func (it *Iface) OffloadSupported() Offload { return it.supported }

// tunFlags returns o as TUNSETOFFLOAD's argument.
func (o Offload) tunFlags() uintptr {
	var f uintptr
	for i, bit := range [...]uintptr{unix.TUN_F_CSUM, unix.TUN_F_TSO4, unix.TUN_F_TSO6, tunFUSO4, tunFUSO6} {
		if o&(1<<uint(i)) != 0 {
			f |= bit
		}
	}
	return f
}

// SetOffload sets what the kernel may leave open in the frames that it hands over from
// now on. Frames queued before may still be of the old kind: when o takes something
// away, switch the carrier off and call Drain after it. It refuses what
// OffloadSupported lacks, and what Usable would cut.
func (it *Iface) SetOffload(o Offload) error {
	it = it.first
	if o&^it.supported != 0 {
		return fmt.Errorf("tunbridge: interface %q: offload %v is not supported here, only %v", it.Name(), o&^it.supported, it.supported)
	}
	if o != o.Usable() {
		return fmt.Errorf("tunbridge: interface %q: offload %v: segmentation needs csum, and uso4 and uso6 go together", it.Name(), o)
	}
	it.mu.Lock()
	defer it.mu.Unlock()
	if it.fd < 0 {
		return ErrClosed
	}
	if err := ioctlValue(it.fd, unix.TUNSETOFFLOAD, o.tunFlags()); err != nil {
		return it.failed("TUNSETOFFLOAD "+o.String(), err)
	}
	return nil
}

// SetCarrier switches the carrier: off, the kernel sends nothing more through the
// interface and reports it as not running; its addresses stay.
func (it *Iface) SetCarrier(on bool) error {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	if it.fd < 0 {
		return ErrClosed
	}
	var v int32
	if on {
		v = 1
	}
	if err := ioctlSetInt(it.fd, unix.TUNSETCARRIER, v); err != nil {
		return it.failed("TUNSETCARRIER", err)
	}
	return nil
}

// Close gives the interface up: it disappears, unless it is persistent; then its carrier
// goes. A second Close does nothing, and neither does one of a queue but the first.
func (it *Iface) Close() error {
	if it.first != it {
		return nil
	}
	it.unwatch()
	it.mu.Lock()
	defer it.mu.Unlock()
	var err error
	for _, q := range it.queues[1:] {
		if q.fd >= 0 {
			err = unix.Close(q.fd)
			q.fd = -1
		}
	}
	if it.fd >= 0 {
		if cerr := unix.Close(it.fd); cerr != nil {
			err = cerr
		}
		it.fd = -1
	}
	it.closeControl()
	if it.at.home >= 0 {
		unix.Close(it.at.home)
		it.at.home = -1
	}
	return err
}
