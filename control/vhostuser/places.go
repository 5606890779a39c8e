package vhostuser

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/vring"
)

// places is where a door keeps the places of its packed queues, for front ends that come back and do not
// know them: a packed ring does not tell where its device side is, and QEMU (7.2) knows only what
// GET_VRING_BASE told it. It is a file, mapped and locked, so that it outlives a process that is killed; or
// memory of this process, which only outlives connections.
//
// Each queue has a slot of 64-bit words. Its journal says where the device side is (vring.Journal); the others, in which ring,
// and with what the front end knows of its place.
type places struct {
	name, path string
	queues     int
	log        Logger

	fd      int // -1: no file
	mem     []byte
	words   []uint64
	unguard func()
}

// The words of a slot.
const (
	placeState    = iota // one of the states below
	placeFeatures        // accepted features
	placeSize            // descriptors
	placeDesc            // guest addresses of the areas
	placeDriver
	placeDevice
	placeBase // what the front end knows, with placeTold
	placeDev  // of the file that holds the descriptors
	placeIno
	placeJournal = 16
)

const (
	// placeRunning: a device side uses the ring, or did when its process or its connection ended.
	placeRunning = 0x31676e69726c62 // "blring1", which is the version as well
	// placeStopped: the front end was told placeBase, and knows the place itself.
	placeStopped = placeRunning + 1<<8

	placeTold = 1 << 32 // in placeBase: there is one
)

// slotBytes is the length of a slot: whole pages, for queues of any size.
const slotBytes = (8*(placeJournal+1+vring.MaxSize) + 4095) &^ 4095

func newPlaces(name, path string, queues int, log Logger) *places {
	return &places{name: name, path: path, queues: queues, log: log, fd: -1}
}

// slot returns the words of a queue's slot, with room for a journal of n descriptors; nil where there is no memory for
// it.
func (p *places) slot(i int, n uint16) []uint64 {
	if p == nil || i >= p.queues {
		return nil
	}
	if p.mem == nil && !p.open() {
		return nil
	}
	at := i * slotBytes
	if p.fd >= 0 {
		// A store to a file that cannot grow any more would be a fault.
		if err := unix.Fallocate(p.fd, 0, int64(at), int64(8*(placeJournal+vring.JournalWords(n)))); err != nil && err != unix.EOPNOTSUPP {
			p.log.Warn("the place of a packed queue is not kept", "link", p.name, "queue", i, "file", p.path, "error", err)
			return nil
		}
	}
	return p.words[at/8:][:placeJournal+vring.JournalWords(n)]
}

// open maps the file, or memory in its place.
func (p *places) open() bool {
	size := p.queues * slotBytes
	if p.path != "" {
		fd, mem, err := mapPlaces(p.path, size)
		if err == nil {
			p.fd, p.mem = fd, mem
			p.unguard = pci.GuardShared(uintptr(unsafe.Pointer(&mem[0])), uint64(size), p.name+": places of packed queues")
		} else {
			p.log.Warn("the places of packed queues are not kept in a file: if this program is killed, guests have to start their drivers anew",
				"link", p.name, "error", err)
			p.path = ""
		}
	}
	if p.mem == nil {
		mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
		if err != nil {
			return false
		}
		p.mem, p.unguard = mem, func() {}
	}
	p.words = unsafe.Slice((*uint64)(unsafe.Pointer(&p.mem[0])), size/8)
	return true
}

// mapPlaces opens, locks and maps a file that belongs to this user alone. It makes one where there is none.
func mapPlaces(path string, size int) (fd int, mem []byte, err error) {
	fd, err = unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return -1, nil, fmt.Errorf("open %s: %w", path, err)
	}
	var st unix.Stat_t
	switch err = unix.Fstat(fd, &st); {
	case err != nil:
	case st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != unix.Geteuid() || st.Mode&0o077 != 0 || st.Nlink != 1:
		err = fmt.Errorf("not a file of this user alone (mode %#o, user %d, %d links): remove it", st.Mode, st.Uid, st.Nlink)
	default:
		if err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
			err = fmt.Errorf("another program uses it: %w", err)
		}
	}
	if err == nil && st.Size < int64(size) {
		err = unix.Ftruncate(fd, int64(size))
	}
	if err == nil {
		mem, err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		closeFD(fd)
		return -1, nil, fmt.Errorf("%s: %w", path, err)
	}
	return fd, mem, nil
}

// close ends the use of the memory. The file stays where the next process may need it: where a front end has not heard a
// place.
func (p *places) close() {
	if p.mem != nil {
		needed := false
		for i := 0; i < p.queues; i++ {
			needed = needed || p.words[i*slotBytes/8+placeState] == placeRunning
		}
		if p.fd >= 0 && !needed {
			_ = unix.Unlink(p.path) // nobody else has it: it is locked
		}
		p.unguard()
		_ = unix.Munmap(p.mem)
		p.mem, p.words = nil, nil
	}
	if p.fd >= 0 {
		closeFD(p.fd)
		p.fd = -1
	}
}

// identity fills in what tells a packed ring from others.
func (b *backend) identity(r *ring, as device.Areas, w []uint64) {
	w[placeFeatures], w[placeSize] = b.features&^(featProtocol|featLogAll), uint64(r.size)
	w[placeDesc], w[placeDriver], w[placeDevice] = uint64(as.Desc.Addr()), uint64(as.Driver.Addr()), uint64(as.Device.Addr())
	w[placeBase] = 0
	if r.toldBase {
		w[placeBase] = uint64(r.told) | placeTold
	}
	w[placeDev], w[placeIno] = 0, 0
	for _, m := range b.mem.maps {
		if a := uint64(as.Desc.Addr()); a >= m.guest && a-m.guest < m.size {
			w[placeDev], w[placeIno] = m.dev, m.ino
		}
	}
}

// sameRing tells whether two slots are of the same ring, whatever the front end knows of its place.
func sameRing(x, y []uint64) bool {
	for i := placeState + 1; i < placeJournal; i++ {
		if x[i] != y[i] && i != placeBase {
			return false
		}
	}
	return true
}

// recall returns the place that was kept of a packed ring, if it is the ring that it was kept of, and the front end knows no
// newer one. c describes the ring.
func (b *backend) recall(r *ring, as device.Areas, c vring.Config) (s vring.State, ok bool, err error) {
	touched, err := vring.PackedRingTouched(c)
	if err != nil || !touched {
		return s, false, nil // the driver made the ring anew; what is wrong with it, the device says
	}
	w := b.places.slot(r.index, r.size)
	if w == nil {
		return s, false, nil
	}
	var now [placeJournal]uint64
	b.identity(r, as, now[:])
	if w[placeState] == placeRunning && sameRing(now[:], w) {
		c.Journal, c.Log = &vring.Journal{Words: w[placeJournal:]}, b.ringLog(r)
		if s, err = vring.JournalState(c); err != nil {
			return s, false, err
		}
		if w[placeBase] != now[placeBase] {
			if w[placeBase]&now[placeBase]&placeTold == 0 {
				b.tellLost(r)
				return s, false, nil
			}
			s, ok, err = b.catchUp(r, c, s, uint16(w[placeBase]))
			if err != nil || !ok {
				b.tellLost(r)
				return s, false, err
			}
		}
		atomic.AddUint64(&b.n.PlacesRecalled, 1)
		return s, true, nil
	}
	// Front ends that have lost the place begin where a new ring does.
	if r.told|0x80000000 == newPackedBase && (w[placeState] != placeStopped || w[placeBase] != now[placeBase]) {
		b.tellLost(r)
	}
	return s, false, nil
}

// tellLost counts and logs a packed ring whose place nobody knows.
func (b *backend) tellLost(r *ring) {
	atomic.AddUint64(&b.n.PlacesLost, 1)
	b.log.Warn("the front end starts a packed queue that was in use at another place than where it was, and that was not kept: "+
		"where nothing moves, the guest's driver has to start anew", "link", b.name, "queue", r.index)
}

// catchUp makes a packed ring one again in which the front end has used descriptors itself, from the place that it knew, begun, to
// the one that it tells now. While its back end is away, QEMU drops what the guest sends. Where it did not know the place any
// more, it has left out what lies between the true one, s, and begun: that is dropped, too. ok is false where that cannot have been.
func (b *backend) catchUp(r *ring, c vring.Config, s vring.State, begun uint16) (told vring.State, ok bool, err error) {
	if told, err = vring.PackedStateFromBase(c, r.told); err != nil {
		return told, false, err
	}
	if told = told.Rewound(); told == s {
		return told, true, nil // it was killed before it knew that the front end had heard the place
	}
	c.State, c.Table = s, &b.table
	d, err := vring.NewPackedDevice(c)
	if err != nil {
		return told, false, err
	}
	// What the front end has used is not available any more: nothing is popped beyond begun.
	var used []vring.Used
	for n := 1; n > 0; {
		var batch vring.Batch
		if n, err = d.Pop(&batch, int(r.size)); err != nil {
			return told, false, err
		}
		for _, ch := range batch.Chains {
			used = append(used, vring.Used{ID: ch.ID, Count: ch.Count})
		}
	}
	if d.State().Avail != begun {
		return told, false, nil
	}
	atomic.AddUint64(&b.n.Dropped, uint64(len(used)))
	return told, true, d.Complete(used)
}

// newPackedBase is the place of a new packed ring. The wrap counter of the used position may be left out.
const newPackedBase = 0x80008000

// keep begins to keep the place of a packed ring that is about to start at s. It returns nil where that cannot be.
func (b *backend) keep(r *ring, as device.Areas, s vring.State) *vring.Journal {
	w := b.places.slot(r.index, r.size)
	if w == nil {
		return nil
	}
	if s == (vring.State{}) {
		s = vring.State{Avail: 1 << 15, Used: 1 << 15, Packed: true}
	}
	j := &vring.Journal{Words: w[placeJournal:]}
	var now [placeJournal]uint64
	b.identity(r, as, now[:])
	if w[placeState] == placeRunning && sameRing(now[:], w) && w[placeBase] == now[placeBase] && j.At(s) {
		return j
	}
	// A process that is killed within this leaves no place, and the front end's word counts: nothing has moved since it gave it.
	atomic.StoreUint64(&w[placeState], 0)
	b.identity(r, as, w)
	j.Reset(s)
	atomic.StoreUint64(&w[placeState], placeRunning)
	return j
}

// heard notes that the front end has heard the place of a ring: it counts from now on.
func (b *backend) heard(r *ring) {
	r.told, r.toldBase = r.base, true
	if !b.packed() {
		return
	}
	if w := b.places.slot(r.index, 0); w != nil {
		atomic.StoreUint64(&w[placeState], 0)
		w[placeBase] = uint64(r.base) | placeTold
		atomic.StoreUint64(&w[placeState], placeStopped)
	}
}

// forget ends the keeping of a ring's place, as it is to be set up anew.
func (b *backend) forget(r *ring) {
	if !b.packed() {
		return
	}
	if w := b.places.slot(r.index, 0); w != nil {
		atomic.StoreUint64(&w[placeState], 0)
	}
}

// moved notes that the memory was replaced: a ring may lie in another file now.
func (b *backend) moved() {
	for i := range b.rings {
		r := &b.rings[i]
		if !r.started || !b.packed() {
			continue
		}
		as, err := b.areas(r, b.mem)
		if w := b.places.slot(i, 0); err == nil && w != nil {
			b.identity(r, as, w)
		}
	}
}
