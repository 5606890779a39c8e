package pci_test

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/pci"
)

const (
	theBoard = "0000:00:04.0"
	theDisk  = "0000:00:05.0"
)

// TestDiagnose: what stands in the way of a function, in each state of the machine: the problem, the words
// that have to be there and those that must not. Open refuses with the very same error.
func TestDiagnose(t *testing.T) {
	const command = "echo " // of the commands that are printed
	withINTx := func() []byte {
		b := config(256)
		b[0x3d] = 1
		return b
	}
	for name, c := range map[string]struct {
		machine func(r *tree, d string)
		mode    pci.Mode
		config  []byte
		problem pci.Problem // Other: nothing
		want    []string    // in the error's text, the first leads
		not     []string
	}{
		"bound behind an IOMMU": {machine: func(r *tree, d string) {
			r.link(d+"/driver", "../../drivers/vfio-pci")
			r.group("7", theBoard)
		}},
		"in mode sysfs": {mode: pci.SysfsOnly, machine: func(*tree, string) {}},
		"unbound behind an IOMMU": {problem: pci.Unbound, want: []string{"bound to no driver", "echo vfio-pci > "}, not: []string{"modprobe"}, machine: func(r *tree, d string) {
			r.group("7", theBoard)
		}},
		"the driver is not loaded": {problem: pci.MissingModule, want: []string{"modprobe vfio-pci && echo vfio-pci"}, machine: func(r *tree, d string) {
			r.group("7", theBoard)
			os.Remove(filepath.Join(r.root, "bus/pci/drivers/vfio-pci"))
			r.write("modules/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.zst: kernel/drivers/vfio/vfio.ko.zst\n")
		}},
		"the kernel has no such driver": {problem: pci.MissingModule, want: []string{"this kernel has no driver vfio-pci", "mode=sysfs works here"}, not: []string{"modprobe", command},
			machine: func(r *tree, d string) {
				r.group("7", theBoard)
				os.Remove(filepath.Join(r.root, "bus/pci/drivers/vfio-pci"))
				r.write("modules/modules.dep", "kernel/drivers/net/veth.ko:\n")
			}},
		"no IOMMU":            {problem: pci.NoIOMMU, want: []string{"(mode=sysfs works here", "no IOMMU"}, not: []string{command}, machine: func(*tree, string) {}},
		"no IOMMU, mode vfio": {problem: pci.NoIOMMU, mode: pci.VFIO, want: []string{"(mode=sysfs works here", "no IOMMU"}, not: []string{command}, machine: func(*tree, string) {}},
		"no IOMMU, UIO": {problem: pci.NoIOMMU, config: withINTx(), want: []string{"(mode=sysfs works here", "echo uio_pci_generic > "}, not: []string{"echo vfio-pci"},
			machine: func(r *tree, d string) { r.mkdir("bus/pci/drivers/uio_pci_generic") }},
		"no IOMMU, UIO, no line interrupt": {problem: pci.NoIOMMU, want: []string{"(mode=sysfs works here"}, not: []string{command},
			machine: func(r *tree, d string) { r.mkdir("bus/pci/drivers/uio_pci_generic") }},
		"no IOMMU, mode without one disabled": {problem: pci.NoIOMMUDisabled, want: []string{"(mode=sysfs works here", "enable_unsafe_noiommu_mode"}, not: []string{"echo vfio-pci"},
			machine: func(r *tree, d string) { r.write("module/vfio/parameters/enable_unsafe_noiommu_mode", "N\n") }},
		"no IOMMU, mode without one enabled": {problem: pci.Unbound, want: []string{"(mode=sysfs works here", "nothing that confines", "echo vfio-pci > "},
			machine: func(r *tree, d string) { r.write("module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n") }},
		"bound without an IOMMU": {machine: func(r *tree, d string) {
			r.write("module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")
			r.link(d+"/driver", "../../drivers/vfio-pci")
			r.group("0", theBoard)
			r.write("kernel/iommu_groups/0/name", "vfio-noiommu\n")
		}},
		"a network interface": {problem: pci.InUse, want: []string{"is in use: the driver virtio-pci has it (network interface eth0, up)"}, not: []string{command, "modprobe"},
			machine: func(r *tree, d string) {
				r.link(d+"/driver", "../../drivers/virtio-pci")
				r.write(d+"/virtio0/net/eth0/flags", "0x1003\n")
			}},
		"one that is down": {problem: pci.InUse, want: []string{"(network interface eth0, down)"}, not: []string{command}, machine: func(r *tree, d string) {
			r.link(d+"/driver", "../../drivers/e1000e")
			r.write(d+"/net/eth0/flags", "0x1002\n")
		}},
		"the boot disk": {problem: pci.InUse, want: []string{"disk vda, mounted at / /boot"}, not: []string{command}, mode: pci.SysfsOnly, machine: func(r *tree, d string) {
			r.link(d+"/driver", "../../drivers/virtio-pci")
			r.write(d+"/virtio1/block/vda/dev", "253:0\n")
			r.write(d+"/virtio1/block/vda/vda1/dev", "253:1\n")
			r.write("proc/self/mountinfo", "22 1 253:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n23 22 253:1 /boot /boot rw - ext4 /dev/vda1 rw\n24 22 0:5 / /dev rw - devtmpfs udev rw\n")
		}},
		"a disk under LVM": {problem: pci.InUse, want: []string{"disk nvme0n1, mounted at /srv"}, not: []string{command}, machine: func(r *tree, d string) {
			r.link(d+"/driver", "../../drivers/nvme")
			r.write(d+"/nvme/nvme0/nvme0n1/dev", "259:0\n")
			r.write(d+"/nvme/nvme0/nvme0n1/nvme0n1p1/dev", "259:1\n")
			r.write("block/dm-0/dev", "254:0\n")
			r.link(d+"/nvme/nvme0/nvme0n1/nvme0n1p1/holders/dm-0", filepath.Join(r.root, "block/dm-0"))
			r.write("proc/self/mountinfo", "22 1 254:0 / /srv rw - xfs /dev/mapper/a-b rw\n")
		}},
		"vsock": {problem: pci.InUse, mode: pci.VFIO, want: []string{"the driver virtio-pci has it"}, not: []string{command}, machine: func(r *tree, d string) {
			r.link(d+"/driver", "../../drivers/virtio-pci")
		}},
		"a group with a disk": {problem: pci.GroupShared, want: []string{"shared with " + theDisk + ", which is in use: the driver nvme has it", "another slot"}, not: []string{command},
			machine: func(r *tree, d string) {
				o := r.function(theDisk, ivshmem, config(256))
				r.link(o+"/driver", "../../drivers/nvme")
				r.group("7", theBoard, theDisk)
			}},
		"the same, bound": {problem: pci.GroupShared, want: []string{"which is in use: the driver nvme"}, not: []string{command}, machine: func(r *tree, d string) {
			r.link(d+"/driver", "../../drivers/vfio-pci")
			o := r.function(theDisk, ivshmem, config(256))
			r.link(o+"/driver", "../../drivers/nvme")
			r.group("7", theBoard, theDisk)
		}},
		"a group with a bridge and a board": {machine: func(r *tree, d string) {
			r.link(d+"/driver", "../../drivers/vfio-pci")
			o := r.function(theDisk, ivshmem, config(256))
			r.link(o+"/driver", "../../drivers/vfio-pci")
			p := r.function("0000:00:01.0", "", config(256))
			r.write(p+"/class", "0x060400\n")
			r.link(p+"/driver", "../../drivers/pcieport")
			r.group("7", theBoard, theDisk, "0000:00:01.0")
		}},
		"a bridge": {problem: pci.BadInput, mode: pci.SysfsOnly, config: append([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, make([]byte, 241)...), want: []string{"is a bridge"}, not: []string{command},
			machine: func(*tree, string) {}},
		"mode uio, bound to vfio-pci": {problem: pci.Unbound, mode: pci.UIO, want: []string{"bound to the driver vfio-pci, not to uio_pci_generic"}, machine: func(r *tree, d string) {
			r.mkdir("bus/pci/drivers/uio_pci_generic")
			r.link(d+"/driver", "../../drivers/vfio-pci")
		}},
		"mode noiommu behind an IOMMU": {problem: pci.BadInput, mode: pci.VFIONoIOMMU, want: []string{"is behind an IOMMU"}, machine: func(r *tree, d string) {
			r.link(d+"/driver", "../../drivers/vfio-pci")
			r.group("7", theBoard)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newTree(t)
			if c.config == nil {
				c.config = config(256)
			}
			c.machine(r, r.function(theBoard, ivshmem, c.config))
			a, o := mustAddress(t, theBoard), pci.Options{Mode: c.mode, Sysfs: r.sysfs()}
			i, err := o.Sysfs.Read(a)
			if err != nil {
				t.Fatal(err)
			}
			found := o.Sysfs.Diagnose(i, o)
			if c.problem == pci.Other {
				if len(found) != 0 {
					t.Errorf("%v", found)
				}
				return
			}
			if len(found) == 0 || found[0].Problem != c.problem || !found[0].UserError() {
				t.Fatalf("%v, want %s", found, c.problem)
			}
			text := found[0].Error()
			for _, w := range c.want {
				if !strings.Contains(text, w) {
					t.Errorf("%q does not tell: %s", text, w)
				}
			}
			for _, w := range c.not {
				if strings.Contains(text, w) {
					t.Errorf("%q tells: %s", text, w)
				}
			}
			// No mode is registered in this program: only what is left to the driver gets as far.
			if _, err := pci.Open(a, o); c.mode == pci.Auto && (err == nil || err.Error() != text) {
				t.Errorf("Open says %q, it was %q before", err, text)
			}
		})
	}
}

// TestSuspect: what shows from outside only. No interrupt remapping, another process, a bridge that is off.
func TestSuspect(t *testing.T) {
	r := newTree(t)
	d := r.function(theBoard, ivshmem, config(256))
	r.link(d+"/driver", "../../drivers/vfio-pci")
	r.group("7", theBoard)
	s, a := r.sysfs(), mustAddress(t, theBoard)
	problems := func(m pci.Mode) (l []pci.Problem, text string) {
		t.Helper()
		i, err := s.Read(a)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range s.Suspect(i, pci.Options{Mode: m}) {
			l = append(l, e.Problem)
			text += e.Error() + "\n"
		}
		return l, text
	}
	r.write("proc/interrupts", "            CPU0\n   1:    9  IR-IO-APIC   1-edge  i8042\n  24:   0  IR-PCI-MSI 65536-edge nvme0q0\n")
	if l, text := problems(pci.Auto); len(l) != 0 {
		t.Errorf("all is well: %s", text)
	}
	r.write("proc/interrupts", "            CPU0\n   1:    9   IO-APIC   1-edge  i8042\n  24:   0   PCI-MSI 65536-edge nvme0q0\n")
	if l, text := problems(pci.Auto); told && (len(l) != 1 || !strings.Contains(text, "no interrupt remapping")) {
		t.Errorf("no interrupt remapping: %s", text)
	}
	r.write("module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n")
	if l, text := problems(pci.Auto); len(l) != 0 {
		t.Errorf("interrupts without remapping are allowed: %s", text)
	}
	r.write(d+"/config", strings.Repeat("\xff", 256))
	if l, text := problems(pci.Auto); len(l) != 1 || l[0] != pci.Gone || !strings.Contains(text, "all-ones") {
		t.Errorf("does not answer: %s", text)
	}
}

// TestBridgeOff: a function below a bridge whose memory access is off is lost, and it is the bridge that is
// named. Before the kernel enabled the function that is no fault.
func TestBridgeOff(t *testing.T) {
	r := newTree(t)
	port := config(256)
	port[0x0e] = 1
	set := func(command uint16) {
		binary.LittleEndian.PutUint16(port[4:], command)
		r.write("devices/pci0000:00/0000:00:10.0/config", string(port))
	}
	set(pci.CommandMemory)
	made := r.function("0000:01:00.0", ivshmem, config(256))
	real := filepath.Join(r.root, "devices/pci0000:00/0000:00:10.0/0000:01:00.0")
	if err := os.Rename(filepath.Join(r.root, made), real); err != nil {
		t.Fatal(err)
	}
	r.link(made, real)
	s, a := r.sysfs(), mustAddress(t, "0000:01:00.0")
	if err := s.Check(a); err != nil {
		t.Error(err)
	}
	set(0)
	if err := s.Check(a); !errors.Is(err, pci.ErrGone) || !strings.Contains(err.Error(), "the bridge 0000:00:10.0 above it has its memory access off") {
		t.Errorf("with the bridge off: %v", err)
	}
	r.write(made+"/enable", "0\n")
	if err := s.Check(a); err != nil {
		t.Errorf("not enabled: %v", err)
	}
}

// TestNeverThere: an address that never had a function is absent, not removed.
func TestNeverThere(t *testing.T) {
	r := newTree(t)
	a := mustAddress(t, "0000:0a:00.0")
	done, err := r.sysfs().Heal(a)
	if done != "" || !errors.Is(err, pci.ErrAbsent) || strings.Contains(err.Error(), "removed") || !strings.Contains(err.Error(), "is not there") {
		t.Errorf("%q, %v", done, err)
	}
}

func TestUsable(t *testing.T) {
	info := &pci.Info{BARs: []pci.BAR{{Index: 0, Start: 4096, Size: 4096}, {Index: 2, Size: 1 << 30, Unassigned: true}}}
	if b, err := info.Usable(0); err != nil || b.Start != 4096 {
		t.Error(b, err)
	}
	for i, word := range map[int]string{-1: "no BAR", 1: "no BAR 1", 6: "no BAR", 2: "pci=realloc"} {
		var e *pci.Error
		if _, err := info.Usable(i); !errors.As(err, &e) || e.Problem != pci.NoBAR || !strings.Contains(err.Error(), word) {
			t.Errorf("BAR %d: %v", i, err)
		}
	}
}
