package tunbridge

import (
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioc builds the number of a request as asm-generic/ioctl.h does, and powerpc's and mips' asm/ioctl.h, which have
// three bits of direction, in another order.
func ioc(write, read bool, typ, nr, size uint) uint {
	none, w, r, dirShift := uint(0), uint(1), uint(2), uint(30)
	if strings.HasPrefix(runtime.GOARCH, "ppc") || strings.HasPrefix(runtime.GOARCH, "mips") {
		none, w, r, dirShift = 1, 4, 2, 29
	}
	dir := uint(0)
	if write {
		dir |= w
	}
	if read {
		dir |= r
	}
	if dir == 0 {
		dir = none
	}
	return dir<<dirShift | size<<16 | typ<<8 | nr
}

// TestRequestNumbers: the numbers of the requests are those of this machine (linux/if_tun.h). All of them say that they
// pass an int, whatever they pass; those of sockets (linux/sockios.h) are the same everywhere.
func TestRequestNumbers(t *testing.T) {
	for _, c := range []struct {
		name        string
		got         uint
		nr          uint
		write, read bool
	}{
		{"TUNSETIFF", unix.TUNSETIFF, 202, true, false},
		{"TUNSETPERSIST", unix.TUNSETPERSIST, 203, true, false},
		{"TUNGETFEATURES", unix.TUNGETFEATURES, 207, false, true},
		{"TUNSETOFFLOAD", unix.TUNSETOFFLOAD, 208, true, false},
		{"TUNGETIFF", unix.TUNGETIFF, 210, false, true},
		{"TUNGETVNETHDRSZ", unix.TUNGETVNETHDRSZ, 215, false, true},
		{"TUNSETVNETHDRSZ", unix.TUNSETVNETHDRSZ, 216, true, false},
		{"TUNSETVNETLE", unix.TUNSETVNETLE, 220, true, false},
		{"TUNGETVNETLE", unix.TUNGETVNETLE, 221, false, true},
		{"TUNSETCARRIER", unix.TUNSETCARRIER, 226, true, false},
	} {
		if want := ioc(c.write, c.read, 'T', c.nr, 4); c.got != want {
			t.Errorf("%s is %#x, by the rule %#x", c.name, c.got, want)
		}
	}
	for name, n := range map[string][2]uint{"SIOCGIFFLAGS": {unix.SIOCGIFFLAGS, 0x8913}, "SIOCSIFFLAGS": {unix.SIOCSIFFLAGS, 0x8914},
		"SIOCGIFMTU": {unix.SIOCGIFMTU, 0x8921}, "SIOCSIFMTU": {unix.SIOCSIFMTU, 0x8922}, "SIOCSIFHWADDR": {unix.SIOCSIFHWADDR, 0x8924},
		"SIOCGIFHWADDR": {unix.SIOCGIFHWADDR, 0x8927}, "SIOCGIFINDEX": {unix.SIOCGIFINDEX, 0x8933}} {
		if n[0] != n[1] {
			t.Errorf("%s is %#x, not %#x", name, n[0], n[1])
		}
	}
}

// TestLayouts: what system calls read and write is laid out as the kernel has it on this machine.
func TestLayouts(t *testing.T) {
	var r ifreq
	word := unsafe.Sizeof(uintptr(0))
	// struct ifreq: 40 bytes where a pointer has 8 (its union holds struct ifmap), else 32.
	if need := 16 + 2*word + 8; unsafe.Sizeof(r) < need {
		t.Errorf("ifreq has %d bytes, the kernel copies %d", unsafe.Sizeof(r), need)
	}
	if off := uintptr(unsafe.Pointer(r.u16())) - uintptr(unsafe.Pointer(&r)); off != unix.IFNAMSIZ {
		t.Errorf("the union of ifreq is at %d", off)
	}
	// The int and the short of the union start where it does, in the machine's byte order.
	*r.i32() = 0x01020304
	if b := (*[4]byte)(unsafe.Pointer(&r.data)); littleEndian() && *b != [4]byte{4, 3, 2, 1} || !littleEndian() && *b != [4]byte{1, 2, 3, 4} {
		t.Errorf("bytes % x, little-endian %v", *b, littleEndian())
	}
	var v unix.Iovec
	if unsafe.Sizeof(v) != 2*word || unsafe.Offsetof(v.Len) != word {
		t.Errorf("iovec has %d bytes, its length is at %d", unsafe.Sizeof(v), unsafe.Offsetof(v.Len))
	}
}
