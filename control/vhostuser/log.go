package vhostuser

import (
	"fmt"
	"math"
	"sync/atomic"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
)

// While a guest is migrated, the front end copies its memory and has to know what is written meanwhile
// (specification, "Migration"). It shares a bitmap (SET_LOG_BASE), and turns marks on and off while the
// rings run: VHOST_F_LOG_ALL for all that is written, flag logRing of SET_VRING_ADDR for a ring's own words.
// The rings stay where they are: package vring marks, and takes another log between two batches
// (device.ChangeQueue). All marks of before are made when the answer goes out.

// logRing is the flag of SET_VRING_ADDR that has a ring's device area marked, at the address log.
const logRing = 1 << 0

// maxLogged is the most guest addresses that a log may stand for: all that machines have.
const maxLogged = 1 << 52

// maxLog is the largest log, in bytes: that of maxLogged, or what this process can map.
const maxLog = (maxLogged/dma.LogPage/8-1)&(math.MaxInt/4) + 1

// dirtyLog is the log of a connection, mapped into this process.
type dirtyLog struct {
	*sharedFile
	offset, size uint64
	bits         *dma.Log
}

// mapLog maps size bytes at offset of the file fd, which stays the caller's. bell is called when pages were
// marked. All errors match ErrLog.
func mapLog(name string, fd int, offset, size uint64, bell func()) (*dirtyLog, error) {
	bad := func(format string, args ...interface{}) (*dirtyLog, error) {
		return nil, fmt.Errorf("%w: %#x bytes at offset %#x of its file: %s", ErrLog, size, offset, fmt.Sprintf(format, args...))
	}
	switch {
	case size < 8:
		return bad("it has at least 8 bytes")
	case size > maxLog:
		return bad("it has at most %#x bytes", uint64(maxLog))
	case offset%8 != 0:
		return bad("the offset has to be a multiple of 8")
	}
	f, at, err := mapShared(fd, offset, size, fmt.Sprintf("%s: dirty log", name))
	if err != nil {
		return bad("%v", err)
	}
	bits, err := dma.NewLog(mmio.NewMem(at, size, mmio.Cached), bell)
	if err != nil {
		f.unmap()
		return bad("%v", err)
	}
	return &dirtyLog{sharedFile: f, offset: offset, size: size, bits: bits}, nil
}

// same tells whether l is the given part of the file fd.
func (l *dirtyLog) same(fd int, offset, size uint64) bool {
	return l.offset == offset && l.size == size && l.of(fd)
}

// logs tells whether a ring is to mark what it writes.
func (b *backend) logs(r *ring) bool {
	return b.features&featLogAll != 0 || b.proto&protoLog != 0 && r.addr.flags&logRing != 0
}

// ringLog returns where a ring marks what it writes.
func (b *backend) ringLog(r *ring) vring.Log {
	if b.dirty == nil || !b.logs(r) {
		return vring.Log{}
	}
	return vring.Log{Bits: b.dirty.bits, Buffers: b.features&featLogAll != 0, At: dma.Addr(r.addr.log), HasAt: r.addr.flags&logRing != 0}
}

// checkLog tells whether the log l, if it is not nil, has a bit for all that is to be marked with the memory m.
func (b *backend) checkLog(l *dirtyLog, m *memory) error {
	any := false
	for i := range b.rings {
		r := &b.rings[i]
		if l == nil || !b.logs(r) {
			continue
		}
		any = true
		if a, n := r.addr, b.deviceArea(r); a.flags&logRing != 0 && !l.bits.Covers(dma.Addr(a.log), n) {
			return fmt.Errorf("%w: its %#x bytes stand for addresses below %#x, the device area of queue %d, %#x bytes, is to be marked at %#x",
				ErrLog, l.size, l.bits.End(), i, n, a.log)
		}
	}
	if !any {
		return nil
	}
	for _, o := range m.maps {
		if !l.bits.Covers(dma.Addr(o.guest), o.size) {
			return fmt.Errorf("%w: its %#x bytes stand for addresses below %#x, the region at %#x of %#x bytes goes beyond: SET_LOG_BASE has to bring a larger one first",
				ErrLog, l.size, l.bits.End(), o.guest, o.size)
		}
	}
	return nil
}

// deviceArea returns the length of a ring's device area in bytes.
func (b *backend) deviceArea(r *ring) uint64 {
	_, _, n := vring.SplitSizes(r.size)
	if b.packed() {
		_, _, n = vring.PackedSizes(r.size)
	}
	return n
}

// checkRing checks what a ring is to mark, with the address that it has now.
func (b *backend) checkRing(r *ring) error {
	if !b.logs(r) {
		return nil
	}
	if a, n := r.addr, b.deviceArea(r); a.flags&logRing != 0 && a.log+n < a.log {
		return fmt.Errorf("%w: %#x bytes at %#x pass the end of the guest's addresses", ErrLog, n, a.log)
	}
	if b.dirty == nil {
		return b.noLog(r)
	}
	return b.checkLog(b.dirty, b.mem)
}

// noLog refuses to have a ring marked that runs, without a log. One that does not run waits for it.
func (b *backend) noLog(r *ring) error {
	if !r.started {
		return nil
	}
	return fmt.Errorf("%w: queue %d runs, and there is none: SET_LOG_BASE has to come first", ErrLog, r.index)
}

// relog has the started rings take the log as it is now. After an error the one before is still in use.
func (b *backend) relog() error {
	for i := range b.rings {
		if err := b.relogRing(&b.rings[i]); err != nil {
			return err
		}
	}
	return nil
}

func (b *backend) relogRing(r *ring) error {
	l := b.ringLog(r)
	if !r.started || r.log == l {
		return nil
	}
	if err := b.dev.ChangeQueue(r.index, device.Change{Log: &l}, deadline()); err != nil {
		return &finalError{fmt.Errorf("log of queue %d: %w", r.index, err)}
	}
	r.log = l
	return nil
}

// setLogBase serves SET_LOG_BASE: the log, in place of the one there is. Its answer is a message of its
// own, without REPLY_ACK too. QEMU sends it once for each queue pair, with the same file.
func (b *backend) setLogBase(m *message) ([]byte, error) {
	if err := b.negotiated(m, protoLog); err != nil {
		return nil, err
	}
	size, offset, err := m.log()
	if err != nil {
		return nil, err
	}
	if len(m.fds) != 1 {
		return nil, m.errorf(ErrDescriptors, "%d of them, 1 wanted", len(m.fds))
	}
	fd := m.takeFD(0)
	defer closeFD(fd)
	done := encodeReply(m.req, nil)
	if b.dirty != nil && b.dirty.same(fd, offset, size) {
		return done, nil
	}
	next, err := mapLog(b.name, fd, offset, size, b.logBell.ring)
	if err != nil {
		return nil, err
	}
	if err := b.checkLog(next, b.mem); err != nil {
		next.unmap()
		return nil, err
	}
	atomic.AddUint64(&b.n.Logs, 1)
	old := b.dirty
	b.dirty = next
	if err := b.relog(); err != nil {
		b.oldLogs = append(b.oldLogs, old) // nil, or both are in use until close
		return nil, err
	}
	if old != nil {
		// QEMU starts the queues of a guest that restarts before it sends the new log, and reads the old one no more.
		for _, o := range b.mem.maps {
			old.bits.CopyTo(next.bits, dma.Addr(o.guest), o.size)
		}
		b.dropLog(old)
	}
	return done, b.settle(true) // rings that wait for a log
}

// dropLog unmaps a log that no ring uses any more.
func (b *backend) dropLog(l *dirtyLog) {
	if l == nil {
		return
	}
	atomic.AddUint64(&b.n.LogOutside, l.bits.Outside())
	l.unmap()
	if b.dirty == l {
		b.dirty = nil
	}
}

// fitLog checks that the log is large enough for the memory m. Where no ring runs, one that is not is forgotten: the
// front end brings another one.
func (b *backend) fitLog(m *memory) error {
	err := b.checkLog(b.dirty, m)
	if err == nil {
		return nil
	}
	for i := range b.rings {
		if b.rings[i].started {
			return err
		}
	}
	b.dropLog(b.dirty)
	return nil
}

// logBell is the eventfd of SET_LOG_FD, which loops ring.
type logBell struct{ v atomic.Value }

type logBellFD struct{ e *doorbell.Eventfd }

func (l *logBell) ring() {
	if f, ok := l.v.Load().(logBellFD); ok {
		ringOnce(f.e)
	}
}

// set replaces the eventfd, nil for none. One that a loop rings at this time is closed after that.
func (l *logBell) set(e *doorbell.Eventfd) {
	f, _ := l.v.Load().(logBellFD)
	l.v.Store(logBellFD{e})
	replace(&f.e, nil)
}

// setLogFD serves SET_LOG_FD: an eventfd that is rung when pages were marked.
func (b *backend) setLogFD(m *message) error {
	if len(m.fds) != 1 {
		return m.errorf(ErrDescriptors, "%d of them, 1 wanted", len(m.fds))
	}
	fd := m.takeFD(0)
	e, err := doorbell.FromFD(fd)
	if err != nil {
		closeFD(fd)
		return m.errorf(ErrDescriptors, "%v", err)
	}
	b.logBell.set(e)
	return nil
}

// setLogging turns marks on or off as the accepted features v have it: they differ from the accepted ones in
// VHOST_F_LOG_ALL alone, and the rings go on.
func (b *backend) setLogging(v uint64) error {
	was := b.features
	b.features = v
	for i := range b.rings {
		if err := b.checkRing(&b.rings[i]); err != nil {
			b.features = was
			return err
		}
	}
	atomic.AddUint64(&b.n.LogChanges, 1)
	return b.relog()
}

// closeLogs ends the use of all logs. No ring uses one any more.
func (b *backend) closeLogs() {
	b.dropLog(b.dirty)
	for _, l := range b.oldLogs {
		b.dropLog(l)
	}
	b.oldLogs = nil
	b.logBell.set(nil)
}
