package vhostuser

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/vring"
)

// newStateDoor starts a door that keeps the places of packed queues in a file.
func newStateDoor(t *testing.T, e *echo, state string) *door {
	t.Helper()
	d := &door{path: t.TempDir() + "/s", log: &testLog{}}
	d.Door = New(Config{Name: "door0", Board: Prefix + d.path, Spec: Spec{Path: d.path, FD: -1}, Device: e, State: state, Log: d.log})
	d.run(t)
	return d
}

// again connects the front end to a door, as QEMU does after a loss of the connection: what it knows of the rings' places is of
// when they started.
func (f *front) again(d *door, base ...uint32) {
	f.t.Helper()
	f.fd = d.connect(f.t)
	f.negotiate(kinds[2].f, allProto)
	f.setTable()
	for i := 0; i < 2; i++ {
		f.bells(i)
		f.start(i, base[i%len(base)])
		f.enable(i, 1)
	}
}

// TestPlaceKept: packed rings go on where they were, after a loss of the connection, and in another process, with a front end that
// does not know their places; with or without a file.
func TestPlaceKept(t *testing.T) {
	for _, file := range []bool{false, true} {
		state := ""
		if file {
			state = filepath.Join(t.TempDir(), "rings")
		}
		e := newEcho(t, 1)
		d := newStateDoor(t, e, state)
		f := newFront(t, -1)
		move := func() error { _, err := e.echo(0); return err }
		for i := 0; i < 2; i++ {
			f.queue(i, kinds[2].f)
		}
		for k := 1; k < 8; k++ {
			f.again(d, newPackedBase)
			f.trip(0, 70*k, byte(k), move)
			if n := d.n.load(); n["places_recalled"] != uint64(2*(k-1)) || n["places_lost"] != 0 || n["failed"] != 0 {
				t.Errorf("file %v, connection %d: %v", file, k, n)
			}
			unix.Shutdown(f.fd, unix.SHUT_RDWR)
		}
		if err := d.stop(); err != nil {
			t.Fatal(err)
		}
		// Another process.
		e = newEcho(t, 1)
		d = newStateDoor(t, e, state)
		if !file {
			f.again(d, newPackedBase)
			if n := d.n.load(); n["places_recalled"] != 0 || n["places_lost"] != 2 || !d.log.has("has to start anew") {
				t.Errorf("without a file: %v, log %q", n, d.log.lines)
			}
			continue
		}
		f.again(d, newPackedBase)
		f.trip(0, 70, 77, move)
		if n := d.n.load(); n["places_recalled"] != 2 || n["places_lost"] != 0 {
			t.Errorf("%v", n)
		}

		// The front end hears the places: from then on its word counts.
		var base [2]uint32
		for i := range base {
			base[i] = f.stop(i)
		}
		unix.Shutdown(f.fd, unix.SHUT_RDWR)
		f.again(d, base[:]...)
		f.trip(0, 70, 80, move)
		unix.Shutdown(f.fd, unix.SHUT_RDWR)
		f.again(d, base[:]...)
		f.trip(0, 70, 78, move)
		if n := d.n.load(); n["places_recalled"] != 4 || n["places_lost"] != 0 {
			t.Errorf("a place that was told: %v", n)
		}
		// The driver made its rings anew while nobody looked.
		unix.Shutdown(f.fd, unix.SHUT_RDWR)
		for i := 0; i < 2; i++ {
			f.queue(i, kinds[2].f)
		}
		f.again(d, newPackedBase)
		f.trip(0, 70, 79, move)
		// The front end resets the device, and its driver leaves the rings as they are.
		f.set(ResetDevice, nil)
		unix.Shutdown(f.fd, unix.SHUT_RDWR)
		f.again(d, newPackedBase)
		if n := d.n.load(); n["places_recalled"] != 4 || n["places_lost"] != 2 || n["failed"] != 0 {
			t.Errorf("new rings: %v", n)
		}
	}
}

// TestPlaceOfOthers: a place is only that of the very same ring.
func TestPlaceOfOthers(t *testing.T) {
	e := newEcho(t, 1)
	d := newStateDoor(t, e, "")
	f := newFront(t, -1)
	move := func() error { _, err := e.echo(0); return err }
	for i := 0; i < 2; i++ {
		f.queue(i, kinds[2].f)
	}
	f.again(d, newPackedBase)
	f.trip(0, 70, 1, move)
	unix.Shutdown(f.fd, unix.SHUT_RDWR)
	// The same words in another file: another machine that lies at the same addresses.
	other := newFront(t, -1)
	for k := uint64(0); k < frontSize; k += 8 {
		other.mem.Store64(k, f.mem.Load64(k))
	}
	other.qs = f.qs
	other.again(d, newPackedBase)
	if n := d.n.load(); n["places_recalled"] != 0 || n["places_lost"] != 2 {
		t.Errorf("%v", n)
	}
}

// TestFrontEndDropped: QEMU drops what the guest sends while its back end is away, and of a packed ring from the place that it
// knows, wherever the true one is. The queue goes on where QEMU stopped; what lies between is dropped as well.
func TestFrontEndDropped(t *testing.T) {
	for _, place := range []uint16{0x8000, ringSize - 4} {
		e := newEcho(t, 1)
		d := newStateDoor(t, e, "")
		f := newFront(t, -1)
		move := func() error { _, err := e.echo(0); return err }
		for i := 0; i < 2; i++ {
			f.queue(i, kinds[2].f)
		}
		f.again(d, newPackedBase)
		tx := f.qs[1].drv
		for k := 0; tx.State().Avail != place; k++ {
			f.trip(0, 1, byte(k), move)
		}
		unix.Shutdown(f.fd, unix.SHUT_RDWR)
		// Chains of two descriptors, to the third one of the ring at least.
		chains, dropped := 0, 0
		for ; tx.State().Avail != 0x8004; chains++ {
			a := guestBase + dma.Addr(buffer(1, chains))
			if n, err := tx.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: a, Len: 30}, {Addr: a + 30, Len: 30}}, Readable: 2, Token: uint32(chains)}}); n != 1 || err != nil {
				t.Fatal(n, err)
			}
		}
		if place != 0x8000 {
			dropped = 2
		}
		for pos := uint64(0); pos < 4; pos += 2 {
			at := f.qs[1].c.Desc.Off + 16*pos
			id := f.mem.Load32(at+16+12) & 0xffff
			f.mem.Store32(at+8, 0)
			f.mem.Store32(at+12, id|0x8080<<16)
		}
		f.again(d, newPackedBase, 0x80048004)
		if n := d.n.load(); n["dropped"] != uint64(dropped) || n["places_recalled"] != 2 || n["places_lost"] != 0 || n["failed"] != 0 {
			t.Errorf("from %#x: %v, log %q", place, n, d.log.lines)
		}
		done := make([]vring.Completion, 8)
		if n, err := tx.Reap(done); n != chains || err != nil {
			t.Errorf("from %#x: %d chains of %d came back, %v", place, n, chains, err)
		}
		f.trip(0, 200, 5, move)

		// A place that cannot have come so is not believed.
		unix.Shutdown(f.fd, unix.SHUT_RDWR)
		f.again(d, newPackedBase, 0x80028002)
		if n := d.n.load(); n["places_lost"] != 1 || n["places_recalled"] != 3 || n["dropped"] != uint64(dropped) || !d.log.has("has to start anew") {
			t.Errorf("from %#x: %v", place, n)
		}
	}
}

// TestPlacesFile: a file that is not this user's alone, or that another program uses, is not taken; the places are kept in
// memory then, and the log tells it once.
func TestPlacesFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "rings")
	for what, make := range map[string]func() error{
		"a symbolic link": func() error { return os.Symlink("elsewhere", path) },
		"a directory":     func() error { return os.Mkdir(path, 0o700) },
		"open to others":  func() error { return os.WriteFile(path, nil, 0o644) },
		"a second name": func() error {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				return err
			}
			return os.Link(path, path+"2")
		},
		"in no directory": func() error { return nil },
	} {
		if err := make(); err != nil {
			t.Fatal(err)
		}
		at := path
		if what == "in no directory" {
			at = filepath.Join(dir, "none", "rings")
		}
		log := &testLog{}
		p := newPlaces("door0", at, 4, log)
		for i := 0; i < 4; i++ {
			if w := p.slot(i, 256); len(w) != placeJournal+257 || p.fd >= 0 {
				t.Errorf("%s: %d words, file %d", what, len(w), p.fd)
			}
		}
		if p.slot(4, 1) != nil {
			t.Errorf("%s: a fifth slot", what)
		}
		if n := log.count("not kept in a file"); n != 1 {
			t.Errorf("%s: log %q", what, log.lines)
		}
		p.close()
		os.Remove(path)
		os.Remove(path + "2")
	}
	a, log := newPlaces("door0", path, 4, &testLog{}), &testLog{}
	b := newPlaces("door0", path, 2, log)
	a.slot(3, 16)[placeState] = placeRunning
	if a.fd < 0 || b.slot(0, 16) == nil || b.fd >= 0 || !log.has("another program uses it") {
		t.Errorf("two programs have one file: %q", log.lines)
	}
	a.close()
	b.close()
	c := newPlaces("door0", path, 8, log)
	if w := c.slot(3, 16); c.fd < 0 || w[placeState] != placeRunning {
		t.Errorf("the file was not found again: %v", w)
	}
	if c.close(); !exists(path) {
		t.Error("the file is gone, and a place in it is needed")
	}
	c.slot(3, 16)[placeState] = placeStopped
	if c.close(); exists(path) {
		t.Error("a file without places that are needed is left behind")
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
