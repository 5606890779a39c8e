package tunbridge

import (
	"encoding/binary"
	"testing"

	"github.com/boardlink/boardlink/virtio"
	"golang.org/x/sys/unix"
)

// TestOffloadFeatures goes through every set of offloads.
func TestOffloadFeatures(t *testing.T) {
	for o := Offload(0); o <= offloadAll; o++ {
		f := OffloadFeatures(o)
		if f&^NetFOffload != 0 {
			t.Errorf("%v: features %#x are none of offload", o, f&^NetFOffload)
		}
		if got := DeviceOffload(f); got != o.Usable() {
			t.Errorf("%v: the device side gets %v back, want %v", o, got, o.Usable())
		}
		if got := DriverOffload(f); got != o.Usable() {
			t.Errorf("%v: the driver side gets %v back, want %v", o, got, o.Usable())
		}
		if u := o.Usable(); u&^o != 0 || u.Usable() != u || o == offloadAll && u != o {
			t.Errorf("%v: usable is %v", o, u)
		}
	}
}

// TestOffloadPrerequisites: whatever subset of the features was negotiated, an interface is
// never told to leave to the peer what the peer did not take (virtio 1.2, 5.1.3.1).
func TestOffloadPrerequisites(t *testing.T) {
	bits := []uint64{NetFCSUM, NetFGuestCSUM, NetFGuestTSO4, NetFGuestTSO6, NetFHostTSO4, NetFHostTSO6, NetFGuestUSO4, NetFGuestUSO6, NetFHostUSO}
	for m := 0; m < 1<<uint(len(bits)); m++ {
		f := uint64(1<<32 | 1<<virtio.NetMAC | 1<<virtio.NetMrgRxbuf) // and others that do not matter
		for i, b := range bits {
			if m>>uint(i)&1 != 0 {
				f |= b
			}
		}
		for _, c := range []struct {
			got  Offload
			need [5]uint64
		}{
			{DeviceOffload(f), [5]uint64{NetFGuestCSUM, NetFGuestTSO4, NetFGuestTSO6, NetFGuestUSO4, NetFGuestUSO6}},
			{DriverOffload(f), [5]uint64{NetFCSUM, NetFHostTSO4, NetFHostTSO6, NetFHostUSO, NetFHostUSO}},
		} {
			for i, need := range c.need {
				if c.got&(1<<uint(i)) != 0 && (f&need == 0 || f&c.need[0] == 0) {
					t.Fatalf("features %#x give %v", f, c.got)
				}
			}
			if f&c.need[0] != 0 && (c.got&OffloadTSO4 != 0) != (f&c.need[1] != 0) {
				t.Fatalf("features %#x give %v", f, c.got)
			}
		}
	}
}

// TestFeatureNumbers compares with the kernel's names where x/sys has them.
func TestFeatureNumbers(t *testing.T) {
	for i, c := range [...][2]uint64{
		{NetFCSUM, 0}, {NetFGuestCSUM, 1}, {NetFGuestTSO4, 7}, {NetFGuestTSO6, 8},
		{NetFHostTSO4, 11}, {NetFHostTSO6, 12},
		{NetFGuestUSO4, 54}, {NetFGuestUSO6, 55}, {NetFHostUSO, 56},
	} {
		if c[0] != 1<<c[1] {
			t.Errorf("entry %d: %#x is not bit %d", i, c[0], c[1])
		}
	}
	if tunFUSO4 != unix.TUN_F_USO4 || tunFUSO6 != unix.TUN_F_USO6 || iffNoCarrier != unix.IFF_NO_CARRIER {
		t.Error("own constants differ from those of x/sys")
	}
	if offloadAll.tunFlags() != 0x67 {
		t.Errorf("TUNSETOFFLOAD takes %#x", offloadAll.tunFlags())
	}
	if s := (OffloadCSUM | OffloadUSO6).String(); s != "csum,uso6" || Offload(0).String() != "none" {
		t.Errorf("String gives %q and %q", s, Offload(0))
	}
	var x [2]byte
	binary.NativeEndian.PutUint16(x[:], 1)
	if littleEndian() != (x[0] == 1) {
		t.Error("littleEndian is wrong")
	}
}
