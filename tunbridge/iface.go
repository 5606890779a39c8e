package tunbridge

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"unicode/utf8"
	"unsafe"

	"github.com/songgao/water"
	"golang.org/x/sys/unix"
)

// LinkType is the kind of an interface.
type LinkType uint8

const (
	// TAP carries Ethernet frames.
	TAP LinkType = iota
	// TUN carries IPv4 and IPv6 packets, without a link header.
	TUN
)

// String returns "tap" or "tun".
func (t LinkType) String() string {
	switch t {
	case TAP:
		return "tap"
	case TUN:
		return "tun"
	}
	return fmt.Sprintf("LinkType(%d)", uint8(t))
}

// flag returns the IFF_ bit of TUNSETIFF.
func (t LinkType) flag() uint16 {
	if t == TUN {
		return unix.IFF_TUN
	}
	return unix.IFF_TAP
}

// MAC is an Ethernet address in the order of the wire.
type MAC [6]byte

// String returns the address as six pairs of hexadecimal digits.
func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// StableMAC derives a locally administered unicast address from seed, such as the
// link's name and the side. The same seed gives the same address on every machine and
// in every release, so that neighbours keep their entries across a restart.
func StableMAC(seed string) MAC {
	h := fnv.New64a()
	h.Write([]byte(seed)) // never fails
	x := h.Sum64()
	// FNV leaves the high bits of short seeds alike: mix them (a bijection).
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	x ^= x >> 33
	var m MAC
	for i := range m {
		m[i] = byte(x >> uint(8*i))
	}
	m[0] = m[0]&^1 | 2 // unicast, locally administered (IEEE 802, 8.4)
	return m
}

// MinMTU is the smallest MTU that the kernel gives an IPv4 interface, in bytes.
const MinMTU = 68

// MinMTU6 is the smallest MTU that IPv6 works with, in bytes (RFC 8200, 5). Below it the kernel removes an interface's IPv6
// addresses.
const MinMTU6 = 1280

// MaxMTU returns the largest MTU of an interface of type t, in bytes (the kernel's
// limit: 65535 less the link header).
func MaxMTU(t LinkType) int {
	if t == TUN {
		return 65535
	}
	return 65535 - 14
}

// Config says which interface Open opens, and how.
type Config struct {
	// Name is the interface's name, of 1 to 15 bytes; empty lets the kernel pick tapN
	// or tunN. A persistent interface of that name and type is attached to as it is,
	// with its addresses.
	Name string
	Type LinkType
	// Offload asks for vnet mode. Where the kernel lacks it the mode is plain:
	// HeaderLen tells, and Warnings says why.
	Offload bool
	// Persist keeps the interface when the program ends, by whatever end. Without it
	// an interface that Open created disappears with the Iface; one that was there
	// before stays either way (Remove removes it).
	Persist bool
	// MAC is the address of a TAP; zero leaves the kernel's choice.
	MAC MAC
	// MTU is in bytes, MinMTU to MaxMTU; 0 leaves what is set (1500 if new).
	MTU int
	// Queues is how many queues to open, at most MaxQueues; 0 means 1. Where the kernel has no multi-queue devices, or the
	// interface was made with a single queue, there is one: Iface.Queues tells, and Warnings says why. An interface that was made with
	// several is attached to with as many as are asked for.
	Queues int
}

// Validate reports what is wrong with c whatever the machine: a *ConfigError, or nil. Open does it, too.
func (c Config) Validate() error {
	if c.Type != TAP && c.Type != TUN {
		return configError(c.Name, nil, "there is no interface of type %v: use tap or tun", c.Type)
	}
	if c.Name != "" {
		if err := checkName(c.Name); err != nil {
			return err
		}
	}
	if err := checkMTU(c.Name, c.Type, c.MTU); c.MTU != 0 && err != nil {
		return err
	}
	if c.Queues < 0 || c.Queues > MaxQueues {
		return configError(c.Name, nil, "%d queues are out of bounds: 1 to %d", c.Queues, MaxQueues)
	}
	if c.MAC != (MAC{}) {
		return checkMAC(c.Name, c.Type, c.MAC)
	}
	return nil
}

func checkName(name string) error {
	if len(name) >= unix.IFNAMSIZ {
		return configError(name, nil, "the name has %d bytes, the limit is %d", len(name), unix.IFNAMSIZ-1)
	}
	switch name {
	case ".", "..", "all", "default":
		return configError(name, nil, "the kernel reserves this name; choose another one")
	}
	for i, c := range name {
		if c <= ' ' || c >= 0x7f || c == '/' || c == ':' || c == '%' {
			what := strconv.QuoteRune(c)
			if c == utf8.RuneError && name[i] >= 0x80 {
				what = fmt.Sprintf("%#02x", name[i]) // not UTF-8
			}
			return configError(name, nil, "%s (at byte %d) cannot be in the name of an interface: use letters, digits, '-', '_' and '.'", what, i)
		}
	}
	return nil
}

func checkMTU(name string, t LinkType, mtu int) error {
	if mtu < MinMTU || mtu > MaxMTU(t) {
		return configError(name, nil, "MTU %d is out of bounds: a %v takes %d to %d", mtu, t, MinMTU, MaxMTU(t))
	}
	return nil
}

func checkMAC(name string, t LinkType, m MAC) error {
	if t != TAP {
		return configError(name, nil, "a %v has no MAC address; %v was asked for", t, m)
	}
	if m == (MAC{}) || m[0]&1 != 0 {
		return configError(name, nil, "MAC address %v is not a unicast address", m)
	}
	return nil
}

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

// Open creates the interface that cfg describes in the calling thread's network namespace, or
// attaches to it. The interface comes up without carrier and without offload, and with
// nothing to read, whoever used it before: call SetCarrier when there is a peer. What the
// user can mend is a *ConfigError. After an error nothing is left behind.
func Open(cfg Config) (*Iface, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	ctl, err := controlSocket()
	if err != nil {
		return nil, fmt.Errorf("tunbridge: interface %q: control socket: %w", cfg.Name, err)
	}
	it := &Iface{fd: -1, ctl: ctl, typ: cfg.Type, cfg: cfg}
	it.at.home, it.at.homeID = openThreadNetns()
	it.at.id = it.at.homeID
	it.first, it.queues, it.inUse = it, []*Iface{it}, 1
	if err := it.open(cfg); err != nil {
		it.Close()
		return nil, err
	}
	return it, nil
}

func (it *Iface) open(cfg Config) error {
	if cfg.Name != "" {
		it.attached = ioctlIfreq(it.ctl, unix.SIOCGIFINDEX, newIfreq(cfg.Name)) == nil
	}
	if cfg.Offload {
		if err := it.openVnet(cfg); err != nil {
			return err
		}
	}
	if it.fd < 0 {
		if err := it.openPlain(cfg); err != nil {
			return err
		}
	}
	if err := it.openQueues(cfg); err != nil {
		return err
	}

	// The carrier waits for the peer. What a former owner left queued may be made for
	// other offloads than ours: it goes. The order matters, the queue is emptied when
	// nothing of that kind can come in any more.
	if err := ioctlSetInt(it.fd, unix.TUNSETCARRIER, 0); err != nil {
		it.warn("the kernel cannot switch the carrier (%v): the interface shows it always on", err)
	}
	if err := ioctlValue(it.fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return it.failed("TUNSETOFFLOAD 0", err)
	}
	it.drain()

	r := newIfreq(it.name)
	if err := ioctlIfreq(it.ctl, unix.SIOCGIFINDEX, r); err != nil {
		return it.failed("SIOCGIFINDEX", err)
	}
	it.setIndex(int(*r.i32()))
	it.made = it.name
	if err := it.getMTU(); err != nil {
		return it.failed("SIOCGIFMTU", err)
	}
	if it.typ == TAP {
		if err := it.getMAC(); err != nil {
			return it.failed("SIOCGIFHWADDR", err)
		}
	}
	if cfg.MTU != 0 {
		if err := it.tolerate(it.setMTU(cfg.MTU), "its MTU stays %d, %d was asked for: run \"ip link set dev %s mtu %d\" as root", it.mtu, cfg.MTU, it.name, cfg.MTU); err != nil {
			return err
		}
	}
	if cfg.MAC != (MAC{}) {
		if err := it.tolerate(it.setMAC(cfg.MAC), "its MAC address stays %v, %v was asked for: run \"ip link set dev %s address %v\" as root", it.mac, cfg.MAC, it.name, cfg.MAC); err != nil {
			return err
		}
	}
	// Last of all: what fails before leaves no interface behind.
	if cfg.Persist {
		if err := ioctlValue(it.fd, unix.TUNSETPERSIST, 1); err != nil {
			return it.failed("TUNSETPERSIST", err)
		}
	}
	return nil
}

// openVnet opens the device in vnet mode. It leaves fd at -1, with a warning, where the
// kernel lacks a part of it.
func (it *Iface) openVnet(cfg Config) error {
	fd, err := openTun(cfg.Name)
	if err != nil {
		return err
	}
	// A negative fd tells the deferred function that it has changed hands.
	defer func() {
		if fd >= 0 {
			unix.Close(fd)
		}
	}()

	if f, err := ioctlGetInt(fd, unix.TUNGETFEATURES); err != nil || f&unix.IFF_VNET_HDR == 0 {
		it.warn("no offload: the kernel's tun driver has no IFF_VNET_HDR")
		return nil
	}
	name, err := it.setiff(fd, cfg, unix.IFF_VNET_HDR)
	if err != nil {
		return err
	}
	r := new(ifreq)

	if err := ioctlSetInt(fd, unix.TUNSETVNETHDRSZ, HeaderLen); err != nil {
		it.warn("no offload: the kernel cannot set the header's length (TUNSETVNETHDRSZ: %v)", err)
		return nil
	}
	leErr := ioctlSetInt(fd, unix.TUNSETVNETLE, 1)
	if leErr != nil && !littleEndian() {
		it.warn("no offload: the kernel cannot set the header's byte order (TUNSETVNETLE: %v)", leErr)
		return nil
	}
	// Read back: a wrong header would garble every frame.
	n, err1 := ioctlGetInt(fd, unix.TUNGETVNETHDRSZ)
	le, err2 := ioctlGetInt(fd, unix.TUNGETVNETLE)
	if leErr != nil {
		le, err2 = 1, nil // before Linux 3.19 the header is in the machine's byte order
	}
	ierr := ioctlIfreq(fd, unix.TUNGETIFF, r)
	if err1 != nil || err2 != nil || ierr != nil || n != HeaderLen || le != 1 || *r.u16()&unix.IFF_VNET_HDR == 0 {
		return configError(name, nil, "the interface keeps its own header settings (length %d, little-endian %d, flags %#x): remove it with \"ip link del %s\" and start again", n, le, *r.u16(), name)
	}
	for _, o := range [...]Offload{offloadAll, offloadAll &^ (OffloadUSO4 | OffloadUSO6), OffloadCSUM} {
		if ioctlValue(fd, unix.TUNSETOFFLOAD, o.tunFlags()) == nil {
			it.supported = o
			break
		}
	}
	if it.supported&OffloadUSO4 == 0 {
		it.warn("no UDP segmentation offload: the kernel is older than 6.2")
	}
	it.fd, it.name, it.hdrLen = fd, name, HeaderLen
	fd = -1
	return nil
}

// openPlain opens the device through the water package, unless it has several queues: water's has
// one. water opens without O_CLOEXEC and leaks its descriptor where TUNSETIFF fails, so everything that can fail is tried
// before it, and fork is held off until the descriptor is ours.
func (it *Iface) openPlain(cfg Config) error {
	if done, err := it.tryPlain(cfg); done || err != nil {
		return err
	}
	wc := water.Config{DeviceType: water.TAP}
	if cfg.Type == TUN {
		wc.DeviceType = water.TUN
	}
	wc.Name = cfg.Name
	wc.Persist = it.attached // water always sets or clears it; ours is set last

	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	w, err := water.New(wc)
	if err != nil {
		return setiffError(it.ctl, cfg.Name, cfg.Type, err)
	}
	defer w.Close()
	sc, ok := w.ReadWriteCloser.(syscall.Conn)
	if !ok {
		return fmt.Errorf("tunbridge: interface %q: the water package hides its descriptor", cfg.Name)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return it.failed("SyscallConn", err)
	}
	var dupErr error
	err = rc.Control(func(fd uintptr) {
		it.fd, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3)
	})
	if err == nil {
		err = dupErr
	}
	if err != nil {
		it.fd = -1
		return it.failed("dup", err)
	}
	it.name = w.Name()
	// O_NONBLOCK belongs to the open file, so it came with the dup; not to depend on water:
	if err := unix.SetNonblock(it.fd, true); err != nil {
		return it.failed("O_NONBLOCK", err)
	}
	return nil
}

// tryPlain finds out whether water would succeed, without creating an interface: it
// attaches to an existing one and lets go of it; without one, TUNSETIFF with no type
// answers EPERM to those who must not create it and EINVAL to the others. A device of several queues
// it opens for good, which done tells.
func (it *Iface) tryPlain(cfg Config) (done bool, err error) {
	fd, err := openTun(cfg.Name)
	if err != nil {
		return false, err
	}
	defer func() {
		if !done {
			unix.Close(fd)
		}
	}()
	if it.attached || cfg.Queues > 1 {
		name, err := it.setiff(fd, cfg, 0)
		if err == nil && it.multi {
			it.fd, it.name, done = fd, name, true
		}
		return done, err
	}
	r := newIfreq(cfg.Name)
	*r.u16() = unix.IFF_NO_PI
	if err := ioctlIfreq(fd, unix.TUNSETIFF, r); err != nil && err != unix.EINVAL {
		return false, setiffError(it.ctl, cfg.Name, cfg.Type, err)
	}
	return false, nil
}

// openTun opens the clone device.
func openTun(name string) (int, error) {
	for {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		switch err {
		case nil:
			return fd, nil
		case unix.EINTR:
			continue
		case unix.ENOENT, unix.ENXIO, unix.ENODEV, unix.ENOTDIR:
			return -1, configError(name, err, "there is no /dev/net/tun: load the kernel's tun driver (modprobe tun) or give the container the device")
		case unix.EACCES, unix.EPERM:
			return -1, configError(name, err, "no permission to open /dev/net/tun: run as root, or open the device to this user (chmod 0666 /dev/net/tun)")
		}
		return -1, fmt.Errorf("tunbridge: interface %q: open /dev/net/tun: %w", name, err)
	}
}

// checkKind reports an existing interface that is not of type t; TUNSETIFF says no more than
// EINVAL of it.
func checkKind(ctl int, name string, t LinkType) error {
	info, err := unix.IoctlGetEthtoolDrvinfo(ctl, name)
	if err != nil {
		if err == unix.EOPNOTSUPP { // every tun driver tells
			return configError(name, nil, "there is such an interface already, and it is neither a tap nor a tun: choose another name")
		}
		if err == unix.EPERM {
			return nil // cannot tell
		}
		if err == unix.ENODEV {
			return nil // gone meanwhile
		}
		return fmt.Errorf("tunbridge: interface %q: SIOCETHTOOL: %w", name, err)
	}
	driver := unix.ByteSliceToString(info.Driver[:])
	kind := unix.ByteSliceToString(info.Bus_info[:])
	if driver != "tun" {
		return configError(name, nil, "there is such an interface already, and its driver is %s: choose another name", driver)
	}
	if kind != t.String() {
		return configError(name, nil, "there is such an interface already, a %s and not a %v: choose another name or type, or remove it (ip link del %s)", kind, t, name)
	}
	return nil
}

// setiffError explains a refusal of TUNSETIFF.
func setiffError(ctl int, name string, t LinkType, err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return fmt.Errorf("tunbridge: interface %q: %w", name, err)
	}
	switch errno {
	case unix.EPERM:
		return configError(name, errno, "not permitted to create or use a %v: CAP_NET_ADMIN is missing in this network namespace (run as root, or setcap cap_net_admin+ep)", t)
	case unix.EBUSY:
		return configError(name, errno, "another process holds the interface: stop it, or choose another name")
	case unix.EINVAL:
		if name != "" && ioctlIfreq(ctl, unix.SIOCGIFINDEX, newIfreq(name)) == nil {
			if err := checkKind(ctl, name, t); err != nil {
				return err
			}
			return configError(name, errno, "there is such an interface already, and it is no %v that can be attached to: choose another name, or remove it (ip link del %s)", t, name)
		}
		return configError(name, errno, "the kernel refuses the interface's name or type (%v)", t)
	}
	return fmt.Errorf("tunbridge: interface %q: TUNSETIFF: %w", name, errno)
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

// MTU returns the interface's MTU in bytes, as it is now; as it was known last where it cannot be asked.
func (it *Iface) MTU() int {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	defer it.leave()
	_ = it.ask(it.getMTU) // else what we knew
	return it.mtu
}

// KnownMTU returns the MTU in bytes as it was seen last, without a system call: by MTU, SetMTU, State or, soon after
// a change, by Watch.
func (it *Iface) KnownMTU() int { return int(atomic.LoadInt32(&it.first.known)) }

// recentMTU returns the MTU in bytes, for loops: with a Watch without a system call or a lock.
func (it *Iface) recentMTU() int {
	if it = it.first; atomic.LoadInt32(&it.watched) != 0 {
		return it.KnownMTU()
	}
	return it.MTU()
}

func (it *Iface) getMTU() error {
	r := newIfreq(it.name)
	err := ioctlIfreq(it.ctl, unix.SIOCGIFMTU, r)
	if err == nil {
		it.noteMTU(int(*r.i32()))
	}
	return err
}

func (it *Iface) noteMTU(mtu int) {
	it.mtu = mtu
	atomic.StoreInt32(&it.known, int32(mtu))
}

// SetMTU sets the MTU, in bytes.
func (it *Iface) SetMTU(mtu int) error {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	defer it.leave()
	if it.fd < 0 {
		return ErrClosed
	}
	if err := checkMTU(it.name, it.typ, mtu); err != nil {
		return err
	}
	if err := it.ask(it.getMTU); err != nil {
		return err
	}
	return it.setMTU(mtu)
}

func (it *Iface) setMTU(mtu int) error {
	if mtu == it.mtu {
		return nil // needs no privilege then
	}
	r := newIfreq(it.name)
	*r.i32() = int32(mtu)
	if err := ioctlIfreq(it.ctl, unix.SIOCSIFMTU, r); err != nil {
		if err == unix.EPERM {
			return configError(it.name, err, "not permitted to set the MTU: CAP_NET_ADMIN is missing")
		}
		return it.failed(fmt.Sprintf("set MTU %d", mtu), err)
	}
	it.noteMTU(mtu)
	return nil
}

// MAC returns the address of a TAP, as it is now; zero for a TUN.
func (it *Iface) MAC() MAC {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	if it.typ == TAP && it.fd >= 0 {
		_ = it.getMAC() // else what we knew
	}
	return it.mac
}

func (it *Iface) getMAC() error {
	r := newIfreq("") // the tun device answers for its own interface
	err := ioctlIfreq(it.fd, unix.SIOCGIFHWADDR, r)
	if err == nil {
		it.mac = r.mac()
	}
	return err
}

// SetMAC sets the address of a TAP.
func (it *Iface) SetMAC(m MAC) error {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	defer it.leave()
	if it.fd < 0 {
		return ErrClosed
	}
	if err := checkMAC(it.name, it.typ, m); err != nil {
		return err
	}
	if err := it.getMAC(); err != nil {
		return it.failed("SIOCGIFHWADDR", err)
	}
	return it.setMAC(m)
}

func (it *Iface) setMAC(m MAC) error {
	if m == it.mac {
		return nil // needs no privilege then
	}
	// By the descriptor: it goes to the device wherever that is, and needs no privilege.
	r := newIfreq("")
	*r.u16() = arphrdEther
	copy(r.hwaddr()[2:], m[:])
	err := ioctlIfreq(it.fd, unix.SIOCSIFHWADDR, r)
	if err == unix.EBUSY {
		// A kernel that cannot change it while the interface is up.
		if err = it.locate(); err == nil {
			err = it.setUp(false)
		}
		if err == nil {
			err = ioctlIfreq(it.fd, unix.SIOCSIFHWADDR, r)
			if uerr := it.setUp(true); err == nil {
				err = uerr
			}
		}
	}
	if err != nil {
		if err == unix.EPERM {
			return configError(it.name, err, "not permitted to set the MAC address: CAP_NET_ADMIN is missing")
		}
		return it.failed("set MAC "+m.String(), err)
	}
	it.mac = m
	return nil
}

// SetUp sets the interface up or down. Down loses its IPv6 addresses.
func (it *Iface) SetUp(up bool) error {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	defer it.leave()
	if it.fd < 0 {
		return ErrClosed
	}
	if err := it.locate(); err != nil {
		return err
	}
	if err := it.setUp(up); err != nil {
		if err == unix.EPERM {
			return configError(it.name, err, "not permitted to set the interface up or down: CAP_NET_ADMIN is missing")
		}
		return it.failed("SIOCSIFFLAGS", err)
	}
	return nil
}

func (it *Iface) setUp(up bool) error {
	r := newIfreq(it.name)
	if err := ioctlIfreq(it.ctl, unix.SIOCGIFFLAGS, r); err != nil {
		return err
	}
	if up == (*r.u16()&unix.IFF_UP != 0) {
		return nil
	}
	*r.u16() ^= unix.IFF_UP
	return ioctlIfreq(it.ctl, unix.SIOCSIFFLAGS, r)
}

// Operations of the data path, for errors.
const (
	opRead  = "read"
	opWrite = "write"
)

// The data path's two calls are raw: the descriptor never blocks, so the scheduler has nothing to do while they run, and telling it
// takes some 7 % of a small frame's time.

// ReadV reads one frame, its header first in vnet mode, into the buffers of iov (1 to
// 1024) and returns its length in bytes. ErrAgain: there is none. An ErrDropped
// lost this one frame; ErrBuffers is the caller's fault. A frame that does not fit is cut without
// notice: a result that fills the buffers to the last byte may be one. The memory is the
// kernel's during the call only.
func (it *Iface) ReadV(iov []unix.Iovec) (int, error) {
	if len(iov) == 0 {
		return 0, ErrBuffers
	}
	for {
		n, _, e := unix.RawSyscall(unix.SYS_READV, uintptr(it.fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, it.ioError(opRead, e)
		}
	}
}

// WriteV writes one frame, its header first in vnet mode, from the buffers of iov (1 to
// 1024) and returns its length in bytes. An ErrDropped lost this one frame; the next may
// pass. The memory is the kernel's during the call only.
func (it *Iface) WriteV(iov []unix.Iovec) (int, error) {
	if len(iov) == 0 {
		return 0, ErrMalformed
	}
	for {
		n, _, e := unix.RawSyscall(unix.SYS_WRITEV, uintptr(it.fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, it.ioError(opWrite, e)
		}
	}
}

// Read is ReadV with a single buffer.
func (it *Iface) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, ErrBuffers
	}
	for {
		n, _, e := unix.Syscall(unix.SYS_READ, uintptr(it.fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, it.ioError(opRead, e)
		}
	}
}

// Write is WriteV with a single buffer.
func (it *Iface) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, ErrMalformed
	}
	for {
		n, _, e := unix.Syscall(unix.SYS_WRITE, uintptr(it.fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, it.ioError(opWrite, e)
		}
	}
}

// Drain throws away what waits to be read in all queues and returns the number of frames. Nobody may
// read at the same time.
func (it *Iface) Drain() int {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	return it.drain()
}

// maxDrain is far above the queue's length (tx_queue_len, 500 or 1000), so that a sender
// cannot hold Drain for ever.
const maxDrain = 1 << 16

func (it *Iface) drain() int {
	var buf [64]byte // the kernel cuts the rest
	n := 0
	for _, q := range it.queues {
		for i := 0; i < maxDrain; i++ {
			_, err := q.Read(buf[:])
			// ErrBuffers here is a frame that the kernel has no header for: it is gone.
			if err != nil && !errors.Is(err, ErrDropped) && err != ErrBuffers {
				break
			}
			n++
		}
	}
	return n
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

// Remove removes a persistent tap or tun interface of the calling thread's network
// namespace that nobody holds. An error for which errors.Is(err, os.ErrNotExist) holds
// says that there is none of that name.
func Remove(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	ctl, err := controlSocket()
	if err != nil {
		return fmt.Errorf("tunbridge: interface %q: control socket: %w", name, err)
	}
	defer unix.Close(ctl)
	if ioctlIfreq(ctl, unix.SIOCGIFINDEX, newIfreq(name)) != nil {
		return configError(name, os.ErrNotExist, "there is no such interface")
	}
	var first error
	for _, f := range [...]uint16{unix.IFF_TAP, unix.IFF_TUN, unix.IFF_TAP | unix.IFF_MULTI_QUEUE, unix.IFF_TUN | unix.IFF_MULTI_QUEUE} {
		t := TAP
		if f&unix.IFF_TUN != 0 {
			t = TUN
		}
		fd, err := openTun(name)
		if err != nil {
			return err
		}
		r := newIfreq(name)
		*r.u16() = f | unix.IFF_NO_PI | iffNoCarrier
		if err = ioctlIfreq(fd, unix.TUNSETIFF, r); err == nil {
			if n, qerr := kernelQueues(name); f&unix.IFF_MULTI_QUEUE != 0 && qerr == nil && n > 1 {
				unix.Close(fd)
				return setiffError(ctl, name, t, unix.EBUSY)
			}
			err = ioctlValue(fd, unix.TUNSETPERSIST, 0)
			unix.Close(fd)
			if err != nil {
				return fmt.Errorf("tunbridge: interface %q: TUNSETPERSIST 0: %w", name, err)
			}
			return nil
		}
		unix.Close(fd)
		if err != unix.EINVAL {
			return setiffError(ctl, name, t, err)
		}
		if first == nil {
			first = err
		}
	}
	if info, err := unix.IoctlGetEthtoolDrvinfo(ctl, name); err == nil {
		if driver := unix.ByteSliceToString(info.Driver[:]); driver != "tun" {
			return configError(name, first, "the interface is not a tap or tun (its driver is %s): it is left alone", driver)
		}
	}
	return configError(name, first, "the interface is not a tap or tun that can be attached to: it is left alone (ip link del %s removes it)", name)
}
