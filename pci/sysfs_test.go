package pci_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/boardlink/boardlink/pci"
)

// tree is a sysfs of our own.
type tree struct {
	t    *testing.T
	root string
}

func newTree(t *testing.T) *tree {
	r := &tree{t, t.TempDir()}
	r.mkdir("bus/pci/devices")
	r.mkdir("bus/pci/drivers/vfio-pci")
	return r
}

func (r *tree) sysfs() pci.Sysfs {
	return pci.Sysfs{Root: r.root, Proc: filepath.Join(r.root, "proc"), Modules: filepath.Join(r.root, "modules")}
}

func (r *tree) mkdir(p string) {
	if err := os.MkdirAll(filepath.Join(r.root, p), 0o755); err != nil {
		r.t.Fatal(err)
	}
}

func (r *tree) write(p, s string) {
	r.mkdir(filepath.Dir(p))
	if err := os.WriteFile(filepath.Join(r.root, p), []byte(s), 0o644); err != nil {
		r.t.Fatal(err)
	}
}

func (r *tree) link(p, to string) {
	r.mkdir(filepath.Dir(p))
	if err := os.Symlink(to, filepath.Join(r.root, p)); err != nil {
		r.t.Fatal(err)
	}
}

// ivshmem is the resource file of QEMU's ivshmem-doorbell with 4 MiB.
const ivshmem = `0x00000000febd1000 0x00000000febd10ff 0x0000000000040200
0x00000000febd2000 0x00000000febd2fff 0x0000000000040200
0x000000fe00000000 0x000000fe003fffff 0x000000000014220c
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
`

// config is a configuration space whose header belongs to ivshmem.
func config(size int) []byte {
	b := make([]byte, size)
	if size < 64 {
		return b
	}
	le := binary.LittleEndian
	le.PutUint32(b, 0x11101af4)
	le.PutUint16(b[4:], pci.CommandMemory)
	le.PutUint32(b[8:], 0x05000001)
	le.PutUint32(b[0x10:], 0xfebd1000)
	le.PutUint32(b[0x14:], 0xfebd2000)
	le.PutUint32(b[0x18:], 0x0000000c)
	le.PutUint32(b[0x1c:], 0xfe)
	if size >= 256 {
		le.PutUint16(b[6:], 0x10)
		b[0x34] = 0x40
		copy(b[0x40:], []byte{0x11, 0x50, 3, 0, 1, 0, 0, 0, 1, 8, 0, 0}) // MSI-X: 4, table BAR1+0, PBA BAR1+0x800
		copy(b[0x50:], []byte{0x05, 0x70, 0x86, 0x01})                   // MSI: 8 vectors, 64 bit, masks
		copy(b[0x70:], []byte{0x09, 0x80, 0x14})                         // vendor, 20 bytes
		e := b[0x80:]                                                    // PCIe endpoint
		e[0] = 0x10
		le.PutUint16(e[2:], 0x0002)
		le.PutUint32(e[4:], 1<<28|2)    // FLR, 512 bytes
		le.PutUint16(e[8:], 1<<5|2<<12) // MPS 256, MRRS 512
		le.PutUint32(e[12:], 4|16<<4)   // 16 GT/s x16
		le.PutUint16(e[18:], 3|8<<4)    // 8 GT/s x8
	}
	if size >= 4096 {
		le.PutUint32(b[0x100:], 0x140<<20|1<<16|0x0001) // AER
		le.PutUint32(b[0x140:], 0<<20|1<<16|0x000b)     // VSEC
		le.PutUint32(b[0x144:], 0x20<<20|6)
	}
	return b
}

func (r *tree) function(a, resource string, config []byte) string {
	d := "bus/pci/devices/" + a
	for name, v := range map[string]string{
		"vendor": "0x1af4", "device": "0x1110", "subsystem_vendor": "0x1af4", "subsystem_device": "0x1100", "class": "0x050000",
		"revision": "0x01", "numa_node": "-1", "enable": "1", "driver_override": "(null)", "irq": "11",
	} {
		r.write(d+"/"+name, v+"\n")
	}
	r.write(d+"/resource", resource)
	r.write(d+"/config", string(config))
	return d
}

// group puts functions, which are there, into an IOMMU group.
func (r *tree) group(n string, as ...string) {
	for _, a := range as {
		r.mkdir("kernel/iommu_groups/" + n + "/devices/" + a)
		r.link("bus/pci/devices/"+a+"/iommu_group", "../../../../kernel/iommu_groups/"+n)
	}
}

func mustAddress(t *testing.T, s string) pci.Address {
	t.Helper()
	a, err := pci.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestRead(t *testing.T) {
	r := newTree(t)
	d := r.function("0000:00:04.0", ivshmem, config(4096))
	r.link(d+"/driver", "../../drivers/vfio-pci")
	r.link(d+"/iommu_group", "../../../../kernel/iommu_groups/7")
	r.mkdir("kernel/iommu_groups/7/devices/0000:00:04.0")
	r.mkdir("kernel/iommu_groups/7/devices/0000:00:04.1")
	r.write(d+"/driver_override", "vfio-pci\n")
	r.function("10000:e1:1f.7", ivshmem, config(64))
	r.function("0000:00:03.0", ivshmem, nil)
	s := r.sysfs()
	as, err := s.Functions()
	if err != nil || len(as) != 3 || as[0].String() != "0000:00:03.0" || as[1].String() != "0000:00:04.0" || as[2].String() != "10000:e1:1f.7" {
		t.Fatalf("functions %v, %v", as, err)
	}
	i, err := s.Read(as[1])
	if err != nil {
		t.Fatal(err)
	}
	want := &pci.Info{
		Address: as[1], Vendor: 0x1af4, Device: 0x1110, SubVendor: 0x1af4, SubDevice: 0x1100, Class: 0x050000, Revision: 1,
		Driver: "vfio-pci", Override: "vfio-pci", Enabled: true, NUMANode: -1, IOMMUGroup: "7", GroupMembers: []pci.Address{mustAddress(t, "0000:00:04.1")},
		BARs: []pci.BAR{
			{Index: 0, Start: 0xfebd1000, Size: 256}, {Index: 1, Start: 0xfebd2000, Size: 4096},
			{Index: 2, Start: 0xfe00000000, Size: 4 << 20, Bits64: true, Prefetch: true},
		},
		Config: config(4096),
		Capabilities: pci.Capabilities{
			Caps: []pci.Capability{
				{ID: pci.CapMSIX, Offset: 0x40}, {ID: pci.CapMSI, Offset: 0x50}, {ID: pci.CapVendor, Offset: 0x70, Length: 20},
				{ID: pci.CapPCIe, Offset: 0x80}, {ID: 1, Extended: true, Version: 1, Offset: 0x100},
				{ID: pci.ExtCapVendor, Extended: true, Version: 1, Offset: 0x140, Length: 0x20},
			},
			MSI:  &pci.MSICap{Offset: 0x50, Vectors: 8, Bits64: true, Masks: true},
			MSIX: &pci.MSIXCap{Offset: 0x40, Vectors: 4, TableBAR: 1, PBABAR: 1, PBAOffset: 0x800},
			PCIe: &pci.PCIeCap{Offset: 0x80, Speed: 80, Width: 8, MaxSpeed: 160, MaxWidth: 16, MaxPayload: 256, CanPayload: 512, MaxRead: 512, FLR: true},
		},
	}
	if d := cmp.Diff(want, i); d != "" {
		t.Error(d)
	}
	if got := i.BARs[2].String(); got != "BAR2 memory 0xfe00000000, 4 MiB, 64 bit, prefetchable" {
		t.Error(got)
	}
	if i, err = s.Read(as[2]); err != nil || i.CapsKnown() || i.Caps != nil || len(i.BARs) != 3 {
		t.Errorf("with a header only: %+v, %v", i, err)
	}
	if i, err = s.Read(as[0]); err != nil || len(i.Config) != 0 || i.IOMMUGroup != "" || i.Driver != "" {
		t.Errorf("without configuration space: %+v, %v", i, err)
	}
	if _, err := json.Marshal(i); err != nil {
		t.Error(err)
	}
	if _, err := s.Read(mustAddress(t, "01:00.0")); !errors.Is(err, pci.ErrAbsent) {
		t.Errorf("an absent function: %v", err)
	}
	if as, err := (pci.Sysfs{Root: filepath.Join(r.root, "nothing")}).Functions(); err != nil || as != nil {
		t.Errorf("a machine without PCI: %v, %v", as, err)
	}
}

func TestAddress(t *testing.T) {
	for in, want := range map[string]string{
		"0000:00:04.0": "0000:00:04.0", "00:04.0": "0000:00:04.0", "10000:FE:1f.7": "10000:fe:1f.7", "ffffffff:ff:1f.7": "ffffffff:ff:1f.7",
	} {
		a, err := pci.ParseAddress(in)
		if err != nil || a.String() != want {
			t.Errorf("%q: %v, %v", in, a, err)
		}
		if b, err := pci.ParseAddress(a.String()); err != nil || b != a {
			t.Errorf("%v does not come back: %v, %v", a, b, err)
		}
	}
	for _, in := range []string{"", "0", "00:04", "00:20.0", "00:04.8", "0000:00:04.0 ", "000:00:04.0", "0000:0:4.0", "100000000:00:04.0", "0000:00:04:0", "+000:00:04.0", "0000:00:+4.0", "a:b:c"} {
		a, err := pci.ParseAddress(in)
		if !errors.Is(err, pci.ErrInput) {
			t.Errorf("%q: %v, %v", in, a, err)
		}
	}
}

func TestParseResource(t *testing.T) {
	z := "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
	cfg := config(64)
	for name, c := range map[string]struct {
		in     string
		config []byte
		want   []pci.BAR
		bad    bool
	}{
		"empty":            {in: ""},
		"one line":         {in: "0x1000 0x1fff 0x200", want: []pci.BAR{{Index: 0, Start: 0x1000, Size: 0x1000}}},
		"above 4 GiB":      {in: z + "0x4000000000 0x7fffffffff 0x14220c\n", want: []pci.BAR{{Index: 1, Start: 1 << 38, Size: 1 << 38, Bits64: true, Prefetch: true}}},
		"I/O ports":        {in: "0xc040 0xc05f 0x40101\n", want: []pci.BAR{{Index: 0, Start: 0xc040, Size: 32, IO: true}}},
		"unset":            {in: z + z + "0x0 0xfffffff 0x2014220c\n", want: []pci.BAR{{Index: 2, Size: 1 << 28, Bits64: true, Prefetch: true, Unassigned: true}}},
		"no address":       {in: "0x0 0xfff 0x40200\n", want: []pci.BAR{{Index: 0, Size: 4096, Unassigned: true}}},
		"no size":          {in: "0x0 0x0 0x40200\n", want: []pci.BAR{{Index: 0, Unassigned: true}}},
		"dropped, 64 bit":  {in: z + z + z + z + z + z, config: cfg, want: []pci.BAR{{Index: 2, Bits64: true, Prefetch: true, Unassigned: true}}},
		"ROM is left out":  {in: z + z + z + z + z + z + "0xfeb80000 0xfebbffff 0x46200\n"},
		"not hexadecimal":  {in: "0x1000 0x1fff flags\n", bad: true},
		"two fields":       {in: "0x1000 0x1fff\n", bad: true},
		"ends before":      {in: "0x2000 0x1000 0x200\n", bad: true},
		"all there is":     {in: "0x0 0xffffffffffffffff 0x200\n", bad: true},
		"65 bits":          {in: "0x1000 0x10000000000000000 0x200\n", bad: true},
		"bridge's windows": {in: z + z + z + z + z + z + z + z, config: append([]byte(nil), make([]byte, 64)...)},
	} {
		got, err := pci.ParseResource(c.in, c.config)
		if (err != nil) != c.bad {
			t.Errorf("%s: error %v", name, err)
		}
		if d := cmp.Diff(c.want, got); d != "" && !c.bad {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestCapabilityDefects(t *testing.T) {
	for name, c := range map[string]struct {
		mend func(b []byte)
		word string
		caps int
	}{
		"loop":            {func(b []byte) { b[0x51] = 0x40 }, "loops", 2},
		"self":            {func(b []byte) { b[0x41] = 0x40 }, "loops", 1},
		"into the header": {func(b []byte) { b[0x41] = 0x20 }, "inside the header", 1},
		"cut off":         {func(b []byte) { b[0x41] = 0xfc; b[0xfc] = pci.CapMSIX }, "cut off", 1},
		"all-ones entry":  {func(b []byte) { b[0x50] = 0xff }, "all-ones", 1},
		"extended loop":   {func(b []byte) { binary.LittleEndian.PutUint32(b[0x140:], 0x100<<20|1<<16|0xb) }, "loops", 6},
		"extended inside": {func(b []byte) { binary.LittleEndian.PutUint32(b[0x140:], 0x080<<20|1<<16|0xb) }, "points to", 6},
		"no list":         {func(b []byte) { b[6] = 0 }, "", 0},
		"gone":            {func(b []byte) { copy(b, "\xff\xff\xff\xff") }, "", 0},
	} {
		b := config(4096)
		c.mend(b)
		got, err := pci.ParseCapabilities(b)
		if (err == nil) != (c.word == "") || err != nil && !strings.Contains(err.Error(), c.word) || len(got.Caps) != c.caps {
			t.Errorf("%s: %v, %v", name, got.Caps, err)
		}
	}
}

func TestCheck(t *testing.T) {
	r := newTree(t)
	a := mustAddress(t, "00:04.0")
	s := r.sysfs()
	for name, c := range map[string]struct {
		mend    func(b []byte)
		problem pci.Problem
		word    string
	}{
		"well":               {func([]byte) {}, 0, ""},
		"all-ones":           {func(b []byte) { copy(b, strings.Repeat("\xff", len(b))) }, pci.Gone, "all-ones"},
		"no memory access":   {func(b []byte) { b[4] = 0 }, pci.Wiped, "memory access is off"},
		"BAR 0 wiped":        {func(b []byte) { copy(b[0x10:], "\x00\x00\x00\x00") }, pci.Wiped, "BAR 0"},
		"BAR 2 wiped":        {func(b []byte) { copy(b[0x18:], "\x0c\x00\x00\x00\x00\x00\x00\x00") }, pci.Wiped, "BAR 2"},
		"low half of 64 bit": {func(b []byte) { b[0x18] = 0x0c }, 0, ""},
	} {
		b := config(256)
		c.mend(b)
		r.function(a.String(), ivshmem, b)
		err := s.Check(a)
		var e *pci.Error
		switch {
		case c.word == "":
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case !errors.As(err, &e) || e.Problem != c.problem || !errors.Is(err, pci.ErrGone) || !strings.Contains(err.Error(), c.word) || e.UserError():
			t.Errorf("%s: %v", name, err)
		}
	}
	os.RemoveAll(filepath.Join(r.root, "bus/pci/devices", a.String()))
	if err := s.Check(a); !errors.Is(err, pci.ErrGone) || !strings.Contains(err.Error(), "removed") {
		t.Errorf("removed: %v", err)
	}
}

func TestSteer(t *testing.T) {
	r := newTree(t)
	a := mustAddress(t, "00:04.0")
	d := r.function(a.String(), ivshmem, config(256))
	s := r.sysfs()
	var e *pci.Error
	if err := s.Bind(a, "nosuch"); !errors.As(err, &e) || e.Problem != pci.MissingModule || !strings.Contains(err.Error(), "this kernel has no driver nosuch") || strings.Contains(err.Error(), "modprobe") {
		t.Errorf("a driver that this kernel does not have: %v", err)
	}
	r.write("modules/modules.dep", "kernel/drivers/no-such.ko.xz: kernel/lib/x.ko\n")
	if err := s.Bind(a, "no_such"); !errors.As(err, &e) || e.Problem != pci.MissingModule || !strings.Contains(err.Error(), "modprobe no_such && echo no_such") {
		t.Errorf("a driver that is not loaded: %v", err)
	}
	// Nobody binds it here: the driver refused it. Why depends on the IOMMU.
	r.write("bus/pci/drivers_probe", "")
	if err := s.Bind(a, "vfio-pci"); !errors.As(err, &e) || e.Problem != pci.NoIOMMU || !strings.Contains(err.Error(), "mode=sysfs works here") {
		t.Errorf("no IOMMU: %v", err)
	}
	r.write("module/vfio/parameters/enable_unsafe_noiommu_mode", "N\n")
	if err := s.Bind(a, "vfio-pci"); !errors.As(err, &e) || e.Problem != pci.NoIOMMUDisabled || !strings.Contains(err.Error(), "echo 1 > /sys/module/vfio") {
		t.Errorf("no-IOMMU mode disabled: %v", err)
	}
	got := map[string]string{}
	for _, f := range []string{d + "/driver_override", "bus/pci/drivers_probe"} {
		b, _ := os.ReadFile(filepath.Join(r.root, f))
		got[filepath.Base(f)] = string(b)
	}
	if want := map[string]string{"driver_override": "vfio-pci\n", "drivers_probe": "0000:00:04.0\n"}; !cmp.Equal(got, want) {
		t.Error(cmp.Diff(want, got))
	}
	r.link(d+"/driver", "../../drivers/vfio-pci")
	if err := s.Bind(a, "vfio-pci"); err != nil {
		t.Errorf("bound already: %v", err)
	}
	if err := s.Reset(a); err == nil {
		b, _ := os.ReadFile(filepath.Join(r.root, d, "reset"))
		t.Errorf("there is no reset file, and it was written: %q", b)
	} else if !errors.As(err, &e) || e.Problem != pci.NoReset || !strings.Contains(err.Error(), "rescan") {
		t.Errorf("no reset: %v", err)
	}
	r.write(d+"/reset", "")
	if err := s.Reset(a); err != nil {
		t.Error(err)
	}
	if err := s.Remove(mustAddress(t, "05:00.0")); !errors.Is(err, pci.ErrAbsent) {
		t.Errorf("removing what is not there: %v", err)
	}
	r.write("bus/pci/rescan", "")
	if err := s.Rescan(); err != nil {
		t.Error(err)
	}
}

func TestOpenModes(t *testing.T) {
	r := newTree(t)
	a := mustAddress(t, "00:04.0")
	d := r.function(a.String(), ivshmem, config(256))
	o := pci.Options{Sysfs: r.sysfs()}
	var e *pci.Error
	if _, err := pci.Open(a, o); !errors.As(err, &e) || e.Problem != pci.NoIOMMU || !e.UserError() || strings.Contains(err.Error(), "echo") {
		t.Errorf("no driver, no IOMMU: %v", err)
	}
	r.group("7", a.String())
	if _, err := pci.Open(a, o); !errors.As(err, &e) || e.Problem != pci.Unbound || !e.UserError() || !strings.Contains(err.Error(), "driver_override") {
		t.Errorf("no driver: %v", err)
	}
	r.link(d+"/driver", "../../drivers/e1000")
	if _, err := pci.Open(a, o); !errors.As(err, &e) || e.Problem != pci.InUse || !strings.Contains(err.Error(), "driver e1000") || strings.Contains(err.Error(), "echo") {
		t.Errorf("another driver: %v", err)
	}
	o.Mode = "turbo"
	if _, err := pci.Open(a, o); !errors.Is(err, pci.ErrInput) || !strings.Contains(err.Error(), `"turbo"`) {
		t.Errorf("an unknown mode: %v", err)
	}
	for _, c := range []struct {
		i    pci.Info
		want pci.Mode
	}{
		{pci.Info{Driver: "vfio-pci", IOMMUGroup: "3"}, pci.VFIO},
		{pci.Info{Driver: "vfio-pci", IOMMUGroup: "0", NoIOMMUGroup: true}, pci.VFIONoIOMMU},
		{pci.Info{Driver: "uio_pci_generic"}, pci.UIO},
	} {
		if m, err := o.Sysfs.AutoMode(&c.i); err != nil || m != c.want {
			t.Errorf("%+v: %q, %v", c.i, m, err)
		}
	}
}

func TestErrorLines(t *testing.T) {
	err := error(&pci.Error{Problem: pci.Permission, Spec: "0000:00:04.0", Reason: "may not open /dev/vfio/7", Mend: "run it as root", Err: os.ErrPermission})
	if got := err.Error(); got != "pci function 0000:00:04.0: may not open /dev/vfio/7: permission denied (run it as root)" || !errors.Is(err, os.ErrPermission) {
		t.Error(got)
	}
	seen := map[string]bool{}
	for p := pci.Other; p <= pci.NoReset; p++ {
		if s := p.String(); seen[s] || s == "problem" {
			t.Errorf("problem %d is called %q", p, s)
		} else {
			seen[s] = true
		}
	}
	if s := (pci.NoReset + 1).String(); s != "problem" {
		t.Error(s)
	}
}

func FuzzParseResource(f *testing.F) {
	f.Add(ivshmem, config(64))
	f.Add("0x0 0xfffffff 0x2014220c\n0x1 0x0 0x200\n", []byte{})
	f.Add("0xffffffffffffffff 0xffffffffffffffff 0x200", config(64))
	f.Fuzz(func(t *testing.T, s string, config []byte) {
		bars, err := pci.ParseResource(s, config)
		if err != nil {
			return
		}
		last := -1
		for _, b := range bars {
			if b.Index <= last || b.Index >= pci.NumBARs {
				t.Errorf("BAR %d behind BAR %d", b.Index, last)
			}
			last = b.Index
			if !b.Unassigned && (b.Size == 0 || b.Start+b.Size-1 < b.Start) {
				t.Errorf("%v wraps or is empty", b)
			}
			if b.Unassigned && b.Start != 0 {
				t.Errorf("%v has no address and starts at %#x", b, b.Start)
			}
		}
	})
}

func FuzzParseCapabilities(f *testing.F) {
	for _, n := range []int{0, 63, 64, 256, 4096} {
		f.Add(config(n))
	}
	b := config(4096)
	b[0x51] = 0x40
	f.Add(b)
	f.Fuzz(func(t *testing.T, config []byte) {
		c, _ := pci.ParseCapabilities(config)
		if len(c.Caps) > 64+1024 {
			t.Errorf("%d capabilities", len(c.Caps))
		}
		for _, e := range c.Caps {
			if e.Offset < 64 || e.Offset+e.Length > len(config) || e.Offset&3 != 0 {
				t.Errorf("capability %+v outside of %d bytes", e, len(config))
			}
		}
		if c.MSIX != nil && (c.MSIX.Vectors < 1 || c.MSIX.Vectors > 2048) || c.MSI != nil && (c.MSI.Vectors < 1 || c.MSI.Vectors > 32) {
			t.Errorf("%+v %+v", c.MSI, c.MSIX)
		}
	})
}

var guestRun = flag.String("guest.run", ".", "of the tests of pci/vfio and pci/uio, run these in the machines")
