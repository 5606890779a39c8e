package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/pci"
)

// carrier is a machine of files: what sysfs and proc tell of it.
type carrier struct {
	t    *testing.T
	root string
}

// newCarrier makes this program see a machine of files until the test ends.
func newCarrier(t *testing.T) *carrier {
	c := &carrier{t, t.TempDir()}
	old := pci.Machine
	t.Cleanup(func() { pci.Machine = old })
	pci.Machine = pci.Sysfs{Root: c.root, Proc: filepath.Join(c.root, "proc"), Modules: filepath.Join(c.root, "modules")}
	c.write("proc/interrupts", "  1:  9  IR-IO-APIC  1-edge  i8042\n")
	return c
}

func (c *carrier) write(name, s string) {
	p := filepath.Join(c.root, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(s), 0o644); err != nil {
		c.t.Fatal(err)
	}
}

// function adds one. bars are addresses and sizes; group and driver may be empty.
func (c *carrier) function(addr string, vendor, device uint16, class uint32, driver, group string, bars map[int][2]uint64) {
	d := "bus/pci/devices/" + addr
	cfg := make([]byte, 256)
	binary.LittleEndian.PutUint16(cfg, vendor)
	binary.LittleEndian.PutUint16(cfg[2:], device)
	cfg[pci.RegCommand] = pci.CommandMemory
	res := ""
	for i := range 7 {
		b, ok := bars[i]
		switch {
		case !ok:
			res += "0x0 0x0 0x0\n"
		case b[0] == 0:
			res += fmt.Sprintf("0x0 %#x 0x20040200\n", b[1]-1)
		default:
			res += fmt.Sprintf("%#x %#x 0x40200\n", b[0], b[0]+b[1]-1)
			binary.LittleEndian.PutUint32(cfg[pci.RegBAR0+4*i:], uint32(b[0]))
		}
	}
	for name, v := range map[string]string{"vendor": fmt.Sprintf("%#04x\n", vendor), "device": fmt.Sprintf("%#04x\n", device), "class": fmt.Sprintf("%#06x\n", class),
		"revision": "0x01\n", "enable": "1\n", "irq": "0\n", "resource": res, "config": string(cfg)} {
		c.write(d+"/"+name, v)
	}
	if driver != "" {
		c.link(d+"/driver", "bus/pci/drivers/"+driver)
	}
	if group != "" {
		c.write("kernel/iommu_groups/"+group+"/devices/"+addr, "")
		c.link(d+"/iommu_group", "kernel/iommu_groups/"+group)
	}
}

func (c *carrier) link(name, to string) {
	if err := os.MkdirAll(filepath.Join(c.root, to), 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(c.root, to), filepath.Join(c.root, name)); err != nil {
		c.t.Fatal(err)
	}
}

var (
	memBARs  = map[int][2]uint64{0: {0xfebd1000, 256}, 2: {0xe0000000, 4 << 20}}
	diskBARs = map[int][2]uint64{0: {0xfeb00000, 16 << 10}}
)

// probe returns what probe tells of a function.
func (c *carrier) probe(addr string) candidate {
	c.t.Helper()
	var out, log bytes.Buffer
	if code := run([]string{"probe", "--all", "--json"}, &out, &log); code != exitOK {
		c.t.Fatalf("status %d: %s", code, &log)
	}
	var l []candidate
	if err := json.Unmarshal(out.Bytes(), &l); err != nil {
		c.t.Fatal(err)
	}
	for _, f := range l {
		if f.Address == addr {
			return f
		}
	}
	c.t.Fatalf("probe does not show %s", addr)
	return candidate{}
}

// TestSameDiagnosis: what probe and doctor find is what host refuses a board for, word for word; and no
// command would unbind what the kernel uses.
func TestSameDiagnosis(t *testing.T) {
	c := newCarrier(t)
	c.link("bus/pci/drivers/unused", "bus/pci/drivers/vfio-pci") // it is loaded
	const disk, small, homeless, lone, shared, plain = "0000:00:05.0", "0000:00:06.0", "0000:00:07.0", "0000:00:08.0", "0000:00:09.0", "0000:00:0a.0"
	c.function(disk, 0x8086, 0x0a54, 0x010802, "nvme", "5", diskBARs)
	c.write("bus/pci/devices/"+disk+"/nvme/nvme0/nvme0n1/dev", "259:0\n")
	c.write("proc/self/mountinfo", "22 1 259:0 / / rw - ext4 /dev/nvme0n1 rw\n")
	c.function(small, 0x1af4, 0x1110, 0x050000, "vfio-pci", "6", map[int][2]uint64{0: {0xfebd2000, 256}, 2: {0xe1000000, 4096}})
	c.function(homeless, 0x1af4, 0x1110, 0x050000, "vfio-pci", "7", map[int][2]uint64{0: {0xfebd3000, 256}, 2: {0, 4 << 20}})
	c.function(lone, 0x1af4, 0x1110, 0x050000, "", "8", memBARs)
	c.function(shared, 0x1af4, 0x1110, 0x050000, "", "5", memBARs)
	c.function(plain, 0x1af4, 0x1110, 0x050000, "", "", memBARs)

	for _, f := range []struct {
		addr, want, not string
		class           error
	}{
		{small, "its shared memory has 4096 bytes", "echo", board.ErrInput},
		{homeless, "BAR 2 (BAR2 memory (no address), 4 MiB) was given no address", "", nil},
		{lone, "is bound to no driver: echo vfio-pci > ", "", nil},
		{shared, "its IOMMU group 5 is shared with " + disk + ", which is in use: the driver nvme has it (disk nvme0n1, mounted at /)", "echo", nil},
		{plain, "is behind no IOMMU, so that vfio-pci does not take it: mode=sysfs works here", "echo", nil},
	} {
		spec := "ivshmem:" + f.addr
		_, err := board.Open(spec, board.Options{Side: board.Host})
		if err == nil || !strings.Contains(problem(err), f.want) || f.not != "" && strings.Contains(err.Error(), f.not) {
			t.Errorf("%s: host: %v", f.addr, err)
			continue
		}
		if f.class != nil && !errors.Is(err, f.class) || f.class == nil && errors.Is(err, board.ErrInput) {
			t.Errorf("%s: of class %v: %v", f.addr, f.class, err)
		}
		p := c.probe(f.addr)
		if !strings.HasPrefix(p.Missing, problem(err)) || f.not != "" && strings.Contains(p.Missing, f.not) {
			t.Errorf("%s: probe: %q, host: %q", f.addr, p.Missing, problem(err))
		}
		var out, log bytes.Buffer
		if code := run([]string{"doctor", spec}, &out, &log); code != exitUsage {
			t.Errorf("%s: doctor ends with status %d", f.addr, code)
		}
		if !strings.Contains(out.String(), "FAIL") || !strings.Contains(out.String(), problem(err)) || !strings.HasSuffix(log.String(), "boardlink doctor: "+err.Error()+"\n") {
			t.Errorf("%s: doctor: %s%s; host: %v", f.addr, &out, &log, err)
		}
	}

	// No such board, and in use besides: nothing is to be done to it.
	described := filepath.Join(t.TempDir(), "any.toml")
	if err := os.WriteFile(described, []byte("[host.window]\nbar = 0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for spec, want := range map[string]string{
		"ivshmem:" + disk:                                   "the function is 8086:0a54, which is no such board: an ivshmem device is 1af4:1110",
		"mpc83xx:" + disk + ",mode=uio":                     "the function is 8086:0a54, which is no such board: an MPC83xx has the vendor 1957",
		"generic:" + described + "@" + disk:                 "is in use: the driver nvme has it (disk nvme0n1, mounted at /)",
		"generic:" + described + "@" + disk + ",mode=sysfs": "is in use: the driver nvme has it",
	} {
		_, err := board.Open(spec, board.Options{Side: board.Host})
		var out, log bytes.Buffer
		code := run([]string{"doctor", spec}, &out, &log)
		if err == nil || code != exitUsage || exitStatus(err) != exitUsage {
			t.Errorf("%s: status %d, %v", spec, code, err)
			continue
		}
		for who, text := range map[string]string{"host": err.Error(), "doctor": out.String() + log.String()} {
			if !strings.Contains(text, want) || strings.Contains(text, "echo") || strings.Contains(text, "modprobe") {
				t.Errorf("%s %s: %s", who, spec, text)
			}
		}
	}
	if p := c.probe(disk); !strings.HasPrefix(p.Missing, "is in use: the driver nvme has it (disk nvme0n1, mounted at /)") || p.Use != "" || strings.Contains(p.Missing, "echo") {
		t.Errorf("probe of a disk: %+v", p)
	}
}

// TestProbeSuspects: what only shows once the function is opened is told as far as it can be seen before.
func TestProbeSuspects(t *testing.T) {
	c := newCarrier(t)
	const addr = "0000:00:08.0"
	c.function(addr, 0x1af4, 0x1110, 0x050000, "vfio-pci", "8", memBARs)
	if p := c.probe(addr); p.Missing != "" || p.Use != "boardlink host --board ivshmem:"+addr || p.Class != "Memory RAM" {
		t.Errorf("nothing is wrong: %+v", p)
	}
	c.write("proc/interrupts", "  1:  9  IO-APIC  1-edge  i8042\n")
	if p := c.probe(addr); runtime.GOARCH == "amd64" && !strings.HasPrefix(p.Missing, "its IOMMU cannot be used safely: the platform has no interrupt remapping") {
		t.Errorf("without interrupt remapping: %+v", p)
	}
	c.write("proc/interrupts", "  1:  9  IR-IO-APIC  1-edge  i8042\n")
	const held = "0000:00:09.0"
	c.function(held, 0x1af4, 0x1110, 0x050000, "uio_pci_generic", "", memBARs)
	// Another process has the file open by which a function is locked in that mode.
	f, err := os.Open(filepath.Join(c.root, "bus/pci/devices", held, "config"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{f}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	if p := c.probe(held); !strings.HasPrefix(p.Missing, fmt.Sprintf("is in use by another process: pid %d (", cmd.Process.Pid)) {
		t.Errorf("a board that another process has: %+v", p)
	}
	c.write("bus/pci/devices/"+addr+"/config", strings.Repeat("\xff", 256))
	if p := c.probe(addr); !strings.HasPrefix(p.Missing, "does not answer any more (it reads as all-ones)") {
		t.Errorf("a board without power: %+v", p)
	}
}
