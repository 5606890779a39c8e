package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Sysfs reads and steers functions through the kernel's sysfs.
type Sysfs struct {
	// Root is where sysfs is mounted; "" is Machine's.
	Root string
	// Proc is where the kernel tells of mounts and interrupts; "" is Machine's.
	Proc string
	// Modules is the directory of the running kernel's modules; "" is Machine's.
	Modules string
}

// Machine is what the empty fields of a Sysfs mean: this machine. Tests that have a tree of their own set
// it before anything is opened.
var Machine = Sysfs{Root: "/sys", Proc: "/proc", Modules: "/lib/modules/" + release()}

// release is the running kernel's: "6.1.0-18-amd64".
func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func (s Sysfs) root() string { return either(s.Root, Machine.Root) }

func (s Sysfs) proc() string { return either(s.Proc, Machine.Proc) }

func (s Sysfs) modules() string { return either(s.Modules, Machine.Modules) }

func either(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

// Dir is the function's directory.
func (s Sysfs) Dir(a Address) string {
	return filepath.Join(s.root(), "bus/pci/devices", a.String())
}

// Functions lists all functions of the machine, by address. A machine without PCI has none.
func (s Sysfs) Functions() ([]Address, error) {
	l, err := os.ReadDir(filepath.Join(s.root(), "bus/pci/devices"))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, fmt.Errorf("pci: %w", err)
	}
	var as []Address
	for _, e := range l {
		if a, err := ParseAddress(e.Name()); err == nil {
			as = append(as, a)
		}
	}
	sort.Slice(as, func(i, j int) bool { return as[i].less(as[j]) })
	return as, nil
}

// Present tells whether the function is there.
func (s Sysfs) Present(a Address) bool {
	_, err := os.Lstat(s.Dir(a))
	return err == nil
}

// HasDriver tells whether a driver of that name is registered for PCI.
func (s Sysfs) HasDriver(name string) bool {
	_, err := os.Stat(filepath.Join(s.root(), "bus/pci/drivers", name))
	return err == nil
}

// Read returns what sysfs tells about a function. What is missing in an odd tree is left
// zero; only a function that is not there (Problem Absent) or whose resources make no sense is an error.
func (s Sysfs) Read(a Address) (*Info, error) {
	dir := s.Dir(a)
	i := &Info{Address: a, NUMANode: -1}
	v, err := readHex(dir, "vendor", 16)
	if err != nil {
		if !s.Present(a) {
			return nil, absent(a)
		}
		return nil, &Error{Problem: Other, Spec: a.String(), Reason: "cannot be read", Err: err}
	}
	i.Vendor = uint16(v)
	if v, err = readHex(dir, "device", 16); err == nil {
		i.Device = uint16(v)
	}
	if v, err = readHex(dir, "subsystem_vendor", 16); err == nil {
		i.SubVendor = uint16(v)
	}
	if v, err = readHex(dir, "subsystem_device", 16); err == nil {
		i.SubDevice = uint16(v)
	}
	if v, err = readHex(dir, "class", 24); err == nil {
		i.Class = uint32(v)
	}
	if v, err = readHex(dir, "revision", 8); err == nil {
		i.Revision = uint8(v)
	}
	i.Enabled = s.enableCount(a) > 0
	if n, err := strconv.Atoi(readLine(dir, "numa_node")); err == nil {
		i.NUMANode = n
	}
	i.Driver = linkBase(dir, "driver")
	if o := readLine(dir, "driver_override"); o != "(null)" {
		i.Override = o
	}
	if i.IOMMUGroup = linkBase(dir, "iommu_group"); i.IOMMUGroup != "" {
		i.NoIOMMUGroup = readLine(dir, "iommu_group/name") == "vfio-noiommu"
		i.GroupMembers = groupMembers(filepath.Join(dir, "iommu_group", "devices"), a)
	}
	i.Config, err = readConfigFile(filepath.Join(dir, "config"))
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
		return nil, &Error{Problem: Other, Spec: a.String(), Reason: "its configuration space cannot be read", Err: err}
	}
	res, err := os.ReadFile(filepath.Join(dir, "resource"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, &Error{Problem: Other, Spec: a.String(), Reason: "its resources cannot be read", Err: err}
	}
	if i.BARs, err = ParseResource(string(res), i.Config); err != nil {
		return nil, &Error{Problem: Other, Spec: a.String(), Reason: "its resources make no sense", Err: err}
	}
	// A list that breaks off is a defect of the board, or of the moment: what was seen counts.
	i.Capabilities, _ = ParseCapabilities(i.Config)
	return i, nil
}

func absent(a Address) *Error {
	return &Error{
		Problem: Absent, Spec: a.String(), Reason: "is not there",
		Mend: "lspci -D lists what is; echo 1 > /sys/bus/pci/rescan looks again",
	}
}

// readConfigFile reads until the kernel allows no more.
func readConfigFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, configLarge)
	n, err := io.ReadFull(f, b)
	if err == io.ErrUnexpectedEOF || err == io.EOF {
		err = nil
	}
	return b[:n], err
}

// enableCount reads how often the function was enabled; 0 where that cannot be read.
func (s Sysfs) enableCount(a Address) int {
	n, err := strconv.Atoi(readLine(s.Dir(a), "enable"))
	if err != nil {
		return 0
	}
	return n
}

func readLine(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func readHex(dir, name string, bits int) (uint64, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 0, bits)
}

func linkBase(dir, name string) string {
	l, err := os.Readlink(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return filepath.Base(l)
}

func groupMembers(dir string, self Address) []Address {
	l, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var as []Address
	for _, e := range l {
		if a, err := ParseAddress(e.Name()); err == nil && a != self {
			as = append(as, a)
		}
	}
	sort.Slice(as, func(i, j int) bool { return as[i].less(as[j]) })
	return as
}

// write writes one value to a file that steers something.
func (s Sysfs) write(a Address, name, v, what string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(v)
		if e := f.Close(); err == nil {
			err = e
		}
	}
	if err == nil {
		return nil
	}
	e := &Error{Problem: Other, Spec: a.String(), Reason: "cannot be " + what, Err: cause(err)}
	switch {
	case errors.Is(err, os.ErrPermission):
		e.Problem, e.Mend = Permission, "run it as root"
	case errors.Is(err, os.ErrNotExist) && !s.Present(a):
		e.Problem, e.Reason, e.Err = Absent, "is not there", nil
	case errors.Is(err, unix.EBUSY):
		e.Problem = Busy
	}
	return e
}

// cause strips the path of an *os.PathError: the Error names the function already.
func cause(err error) error {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

// Bind binds the function to a driver, and to no other until Unbind: by driver_override (Linux
// 3.16), leaving the driver it has. It fails where the driver is not loaded or refuses the function.
func (s Sysfs) Bind(a Address, driver string) error {
	i, err := s.Read(a)
	if err != nil {
		return err
	}
	if i.Driver == driver {
		return nil
	}
	if !s.HasDriver(driver) {
		return s.needDriver(i, driver)
	}
	dir := s.Dir(a)
	if err := s.write(a, filepath.Join(dir, "driver_override"), driver+"\n", "given the driver "+driver); err != nil {
		return err
	}
	if i.Driver != "" {
		if err := s.write(a, filepath.Join(dir, "driver/unbind"), a.String()+"\n", "taken from its driver "+i.Driver); err != nil {
			return err
		}
	}
	if err := s.write(a, filepath.Join(s.root(), "bus/pci/drivers_probe"), a.String()+"\n", "bound to "+driver); err != nil {
		return err
	}
	// The kernel does not report a driver's refusal here.
	if got := linkBase(dir, "driver"); got != driver {
		e := &Error{Problem: Other, Spec: a.String(), Reason: fmt.Sprintf("the driver %s refused it", driver), Mend: "dmesg tells why"}
		if driver == "vfio-pci" && linkBase(dir, "iommu_group") == "" {
			return s.noIOMMU(i)
		}
		return e
	}
	return nil
}

// Unbind takes the function from its driver and lifts the override. It blocks until the driver has let
// go: where vfio-pci has it, until the process that has it open closes it.
func (s Sysfs) Unbind(a Address) error {
	dir := s.Dir(a)
	if d := linkBase(dir, "driver"); d != "" {
		if err := s.write(a, filepath.Join(dir, "driver/unbind"), a.String()+"\n", "taken from its driver "+d); err != nil {
			return err
		}
	}
	return s.write(a, filepath.Join(dir, "driver_override"), "\n", "freed of its override")
}

// Reset resets the function by whatever method the kernel has for it. It must not be in use.
func (s Sysfs) Reset(a Address) error {
	err := s.write(a, filepath.Join(s.Dir(a), "reset"), "1\n", "reset")
	var e *Error
	if errors.As(err, &e) && e.Problem == Other && errors.Is(e.Err, os.ErrNotExist) {
		e.Problem, e.Reason, e.Err = NoReset, "the kernel knows no way to reset it", nil
		e.Mend = "remove it and rescan the bus: echo 1 > " + filepath.Join("/sys/bus/pci/devices", a.String(), "remove") + "; echo 1 > /sys/bus/pci/rescan"
	}
	return err
}

// Remove takes the function out of the kernel's sight, as if unplugged, and drops its driver. As Unbind, it blocks while
// a process has the function open through VFIO, and is not for that process.
func (s Sysfs) Remove(a Address) error {
	return s.write(a, filepath.Join(s.Dir(a), "remove"), "1\n", "removed")
}

// Rescan makes the kernel look for functions on all buses, and give those it finds addresses.
func (s Sysfs) Rescan() error {
	name := filepath.Join(s.root(), "bus/pci/rescan")
	if err := os.WriteFile(name, []byte("1\n"), 0); err != nil {
		e := &Error{Problem: Other, Spec: "*", Reason: "the bus cannot be rescanned", Err: cause(err)}
		if errors.Is(err, os.ErrPermission) {
			e.Problem, e.Mend = Permission, "run it as root"
		}
		return e
	}
	return nil
}

// Check asks the function itself, past every cache: it returns nil where it answers, decodes memory, and
// its BARs still hold the addresses that the kernel gave them, and the bridges above an enabled function pass
// accesses on. Else an *Error with Problem Gone or Wiped. It reads headers of configuration spaces, which
// every user may.
func (s Sysfs) Check(a Address) error {
	dir := s.Dir(a)
	f, err := os.Open(filepath.Join(dir, "config"))
	if err != nil {
		if !s.Present(a) {
			return &Error{Problem: Gone, Spec: a.String(), Reason: "was removed from the bus"}
		}
		return &Error{Problem: Other, Spec: a.String(), Reason: "cannot be asked", Err: cause(err)}
	}
	defer f.Close()
	var b [configHeader]byte
	if _, err := io.ReadFull(f, b[:]); err != nil {
		if errors.Is(err, unix.ENODEV) || !s.Present(a) {
			return &Error{Problem: Gone, Spec: a.String(), Reason: "was removed from the bus"}
		}
		return &Error{Problem: Other, Spec: a.String(), Reason: "cannot be asked", Err: cause(err)}
	}
	res, err := os.ReadFile(filepath.Join(dir, "resource"))
	if err != nil && !s.Present(a) {
		return &Error{Problem: Gone, Spec: a.String(), Reason: "was removed from the bus"}
	}
	bars, err := ParseResource(string(res), nil)
	if err != nil {
		return &Error{Problem: Other, Spec: a.String(), Reason: "its resources make no sense", Err: err}
	}
	if err := checkHeader(a, b[:], bars); err != nil {
		return err
	}
	// The kernel turns the bridges above on when it enables the function, not before.
	if s.enableCount(a) == 0 {
		return nil
	}
	return s.checkBridges(a)
}

// checkBridges asks the bridges above the function whether they pass accesses on to it.
func (s Sysfs) checkBridges(a Address) error {
	path, err := filepath.EvalSymlinks(s.Dir(a))
	if err != nil {
		return nil // a tree without them
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		bridge, err := ParseAddress(filepath.Base(dir))
		if err != nil {
			return nil // the host bridge
		}
		f, err := os.Open(filepath.Join(dir, "config"))
		if err != nil {
			continue
		}
		var b [configHeader]byte
		_, err = io.ReadFull(f, b[:])
		f.Close()
		le := binary.LittleEndian
		switch {
		case err != nil || b[RegHeaderType]&0x7f != 1:
		case le.Uint16(b[RegVendor:]) == 0xffff:
			return &Error{
				Problem: Gone, Spec: a.String(), Reason: "the bridge " + bridge.String() + " above it does not answer (it reads as all-ones)",
				Mend: "without power, or in reset",
			}
		case le.Uint16(b[RegCommand:])&CommandMemory == 0:
			return &Error{
				Problem: Gone, Spec: a.String(), Reason: "the bridge " + bridge.String() + " above it has its memory access off: nothing reaches the board",
				Mend: "setpci -s " + bridge.String() + " COMMAND=2:2 turns it on",
			}
		}
	}
}

// checkHeader compares the header of a configuration space with what the kernel set up.
func checkHeader(a Address, b []byte, bars []BAR) error {
	le := binary.LittleEndian
	if le.Uint16(b[RegVendor:]) == 0xffff {
		return &Error{
			Problem: Gone, Spec: a.String(), Reason: "does not answer any more (it reads as all-ones)",
			Mend: "pulled, without power, or in reset",
		}
	}
	if b[RegHeaderType]&0x7f != 0 {
		return nil // bridges have other registers there
	}
	wiped := func(format string, args ...interface{}) error {
		return &Error{
			Problem: Wiped, Spec: a.String(), Reason: fmt.Sprintf(format, args...),
			Mend: "it was reset under us: let it be reset by the kernel, or remove it and rescan the bus",
		}
	}
	cmd := le.Uint16(b[RegCommand:])
	for _, bar := range bars {
		if bar.Unassigned || bar.Index >= NumBARs {
			continue
		}
		if bar.IO {
			continue // the address on the bus is not the processor's everywhere
		}
		if cmd&CommandMemory == 0 {
			return wiped("its memory access is off")
		}
		r := uint64(le.Uint32(b[RegBAR0+4*bar.Index:]) &^ 0xf)
		if bar.Bits64 && bar.Index+1 < NumBARs {
			r |= uint64(le.Uint32(b[RegBAR0+4*bar.Index+4:])) << 32
		}
		// Behind some bridges (PowerPC) the bus address is not the processor's: only an
		// empty register tells for sure.
		if r == 0 && bar.Start != 0 {
			return wiped("its BAR %d lost its address", bar.Index)
		}
	}
	return nil
}
