package pci

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Names of the drivers that functions are opened through.
const (
	driverVFIO = "vfio-pci"
	driverUIO  = "uio_pci_generic"
)

// Diagnose tells what stands in the way of opening the function with these options, the first thing
// first; nothing where nothing is known to. Open refuses with the first of them: what a program shows of
// a function beforehand and what Open says are the same texts. Where a driver of the kernel uses the
// function, or one of its IOMMU group, no error names a command: it would take a disk or a network
// interface away.
func (s Sysfs) Diagnose(i *Info, o Options) []*Error {
	if e := s.inUse(i); e != nil {
		return []*Error{e}
	}
	var found []*Error
	add := func(e *Error) {
		if e != nil {
			found = append(found, e)
		}
	}
	if len(i.Config) >= configHeader && !allOnes(i.Config) && i.Config[RegHeaderType]&0x7f != 0 {
		add(&Error{Problem: BadInput, Spec: i.Address.String(), Reason: "is a bridge, which cannot be a board"})
		return found
	}
	m := o.Mode
	if m == Auto {
		m, _ = s.AutoMode(i)
	}
	switch m {
	case UIO:
		add(s.needDriver(i, driverUIO))
	case SysfsOnly:
		switch i.Driver {
		case "", driverUIO, "pci-stub":
		default:
			add(&Error{
				Problem: Unbound, Spec: i.Address.String(),
				Reason: "is bound to the driver " + i.Driver + ": in mode sysfs it must be bound to none",
				Mend:   "echo " + i.Address.String() + " > /sys/bus/pci/devices/" + i.Address.String() + "/driver/unbind",
			})
		}
	case VFIONoIOMMU:
		if i.IOMMUGroup != "" && !i.NoIOMMUGroup {
			add(&Error{Problem: BadInput, Spec: i.Address.String(), Reason: "is behind an IOMMU", Mend: "open it in mode vfio"})
			break
		}
		add(s.vfioDriver(i))
	default:
		if m == VFIO && i.NoIOMMUGroup {
			add(s.noIOMMU(i))
			break
		}
		// A group of which the kernel uses a member cannot be opened, whatever the function is bound to.
		if e := s.groupInUse(i); e != nil {
			add(e)
			break
		}
		add(s.vfioDriver(i))
	}
	add(s.notAllowed(i, m))
	return found
}

// Suspect tells what Open cannot know before it tries, as far as it shows from outside: another process
// that has the function, an IOMMU that is not safe to use, a function that lost its configuration (which
// boards are opened with again, see Heal). The texts are those that Open would give.
func (s Sysfs) Suspect(i *Info, o Options) []*Error {
	var found []*Error
	m := o.Mode
	if m == Auto {
		m, _ = s.AutoMode(i)
	}
	if m == VFIO && s.noRemapping() {
		found = append(found, NoRemapping(i.Address, nil))
	}
	if h := Holders(s.file(i, m)); h != "" && m != Auto {
		found = append(found, Held(i, m, h))
	}
	if err := s.Check(i.Address); err != nil {
		if e, ok := err.(*Error); ok && (e.Problem == Gone || e.Problem == Wiped) {
			found = append(found, e)
		}
	}
	return found
}

// Held is the error for a function that other processes have; holders may be empty.
func Held(i *Info, m Mode, holders string) *Error {
	e := &Error{Problem: Busy, Spec: i.Address.String(), Reason: "is in use by another process"}
	if m == VFIO || m == VFIONoIOMMU {
		e.Reason = "its IOMMU group " + i.IOMMUGroup + " is in use by another process"
		e.Mend = "end it, or give each program a board of its own"
	}
	if holders != "" {
		e.Reason += ": " + holders
	}
	return e
}

// NoRemapping is the error for a machine whose IOMMU does not confine interrupts; err may be nil.
func NoRemapping(a Address, err error) *Error {
	return &Error{
		Problem: Permission, Spec: a.String(), Reason: "its IOMMU cannot be used safely", Err: err,
		Mend: "the platform has no interrupt remapping; if all boards are trusted: " +
			"echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
	}
}

// GroupTaken is the error for a function whose IOMMU group this program uses for another board already:
// the IOMMU does not tell the two apart, so that each could write the other's memory.
func GroupTaken(i *Info, other Address) *Error {
	return &Error{
		Problem: GroupShared, Spec: i.Address.String(),
		Reason: "its IOMMU group " + i.IOMMUGroup + " is that of " + other.String() + ", which this program has open: each of the two could read and write the memory that is meant for the other",
		Mend:   "move one of them to another slot, or, where they may, give --allow-shared-group",
	}
}

// GroupPath is the device file of a function's IOMMU group.
func GroupPath(i *Info) string {
	if i.NoIOMMUGroup {
		return "/dev/vfio/noiommu-" + i.IOMMUGroup
	}
	return "/dev/vfio/" + i.IOMMUGroup
}

// file is what a function is opened by in a mode, and locked by for one process.
func (s Sysfs) file(i *Info, m Mode) string {
	if (m == VFIO || m == VFIONoIOMMU) && i.IOMMUGroup != "" {
		return GroupPath(i)
	}
	return filepath.Join(s.Dir(i.Address), "config")
}

// NotAllowed is the error for a function whose file of that mode this process may not open.
func (s Sysfs) NotAllowed(i *Info, m Mode, err error) *Error {
	file, mend := s.file(i, m), "run it as root"
	switch {
	case m == VFIO && err != unix.EPERM:
		mend += ", or: chown " + userName() + " " + file
	case m == VFIO || m == VFIONoIOMMU:
		mend += ": without an IOMMU the kernel demands CAP_SYS_RAWIO"
	}
	return &Error{Problem: Permission, Spec: i.Address.String(), Reason: "may not open " + file, Mend: mend, Err: err}
}

// notAllowed looks whether this process may open the file of the mode. One that is missing is another
// problem.
func (s Sysfs) notAllowed(i *Info, m Mode) *Error {
	if m == Auto || (m == VFIO || m == VFIONoIOMMU) && (i.Driver != driverVFIO || i.IOMMUGroup == "") {
		return nil
	}
	if unix.Access(s.file(i, m), unix.R_OK|unix.W_OK) != unix.EACCES {
		return nil
	}
	return s.NotAllowed(i, m, unix.EACCES)
}

func userName() string {
	if u := os.Getenv("USER"); u != "" && u != "root" {
		return u
	}
	return strconv.Itoa(os.Getuid())
}

// userDriver tells whether a driver leaves its functions to programs, or to nobody.
func userDriver(name string) bool {
	switch name {
	case "", driverUIO, "igb_uio", "pci-stub":
		return true
	}
	return strings.Contains(name, "vfio")
}

// inUse is the error for a function that a driver of the kernel uses, nil where none does.
func (s Sysfs) inUse(i *Info) *Error {
	if userDriver(i.Driver) {
		return nil
	}
	return &Error{
		Problem: InUse, Spec: i.Address.String(), Reason: "is in use: " + s.usage(i),
		Mend: "if it is the board, take it from that driver first",
	}
}

// usage describes what the driver of a function makes of it: "the driver virtio-pci has it (network
// interface eth0, up)".
func (s Sysfs) usage(i *Info) string {
	u := "the driver " + i.Driver + " has it"
	if l := append(s.interfaces(i.Address), s.disks(i.Address)...); len(l) > 0 {
		u += " (" + strings.Join(l, "; ") + ")"
	}
	return u
}

// below lists the entries of the directories called name in the function's directory and the devices below
// it: a driver's own bus (virtio0, ata1/host0/target0:0:0/0:0:0:0) lies between for some.
func (s Sysfs) below(a Address, name string) []string {
	var found []string
	dir := s.Dir(a)
	for depth := 0; depth < 6; depth++ {
		l, err := filepath.Glob(filepath.Join(dir, name, "*"))
		if err != nil {
			return found
		}
		found = append(found, l...)
		dir = filepath.Join(dir, "[^.:]*[0-9]") // not the links driver, subsystem, power ...
	}
	return found
}

// interfaces describes the network interfaces of a function.
func (s Sysfs) interfaces(a Address) []string {
	var l []string
	for _, d := range s.below(a, "net") {
		state := "down"
		if flags, err := readHex(d, "flags", 32); err == nil && flags&unix.IFF_UP != 0 {
			state = "up"
		}
		l = append(l, "network interface "+filepath.Base(d)+", "+state)
	}
	return l
}

// disks describes the disks of a function, with where they are mounted.
func (s Sysfs) disks(a Address) []string {
	var l []string
	mounts := s.mounts()
	disks := s.below(a, "block")
	nvme, _ := filepath.Glob(filepath.Join(s.Dir(a), "nvme/nvme*/nvme*n*"))
	for _, d := range append(disks, nvme...) {
		text := "disk " + filepath.Base(d)
		if at := mountedAt(d, mounts, 0); len(at) > 0 {
			text += ", mounted at " + strings.Join(at, " ")
		}
		l = append(l, text)
	}
	return l
}

// mountedAt lists where a block device, its partitions, and what is built upon them (LVM, dm-crypt, md)
// are mounted.
func mountedAt(dir string, mounts map[string][]string, depth int) []string {
	at := append([]string(nil), mounts[readLine(dir, "dev")]...)
	if depth > 4 {
		return at
	}
	parts, _ := filepath.Glob(filepath.Join(dir, filepath.Base(dir)+"*"))
	holders, _ := filepath.Glob(filepath.Join(dir, "holders", "*"))
	for _, d := range append(parts, holders...) {
		at = append(at, mountedAt(d, mounts, depth+1)...)
	}
	return at
}

// mounts maps device numbers, "253:1", to mount points.
func (s Sysfs) mounts() map[string][]string {
	f, err := os.Open(filepath.Join(s.proc(), "self/mountinfo"))
	if err != nil {
		return nil
	}
	defer f.Close()
	m := map[string][]string{}
	for l := bufio.NewScanner(f); l.Scan(); {
		if w := strings.Fields(l.Text()); len(w) > 4 && len(m[w[2]]) < 4 {
			m[w[2]] = append(m[w[2]], w[4])
		}
	}
	return m
}

// groupInUse is the error for a function whose IOMMU group has another member that a driver of the kernel
// uses; nil where none does.
func (s Sysfs) groupInUse(i *Info) *Error {
	var names []string
	for _, m := range i.GroupMembers {
		o, err := s.Read(m)
		// Bridges stay with their driver: the kernel allows it.
		if err != nil || userDriver(o.Driver) && o.Driver != driverUIO || o.Driver == "pcieport" || o.Class>>8 == classBridge {
			continue
		}
		names = append(names, m.String()+", which is in use: "+s.usage(o))
	}
	if len(names) == 0 {
		return nil
	}
	return groupShared(i, "its IOMMU group "+i.IOMMUGroup+" is shared with "+strings.Join(names, ", and "))
}

// classBridge is class and subclass of a bridge between PCI buses.
const classBridge = 0x0604

func groupShared(i *Info, reason string) *Error {
	return &Error{
		Problem: GroupShared, Spec: i.Address.String(), Reason: reason,
		Mend: "move the board to another slot; mode=sysfs works without VFIO, by polling, with no driver bound to the board",
	}
}

// GroupNotFree is the error for a function whose IOMMU group VFIO does not give out.
func (s Sysfs) GroupNotFree(i *Info) *Error {
	if e := s.groupInUse(i); e != nil {
		return e
	}
	return groupShared(i, "its IOMMU group "+i.IOMMUGroup+" is not free: a driver of the kernel has another member of it (ls /sys/kernel/iommu_groups/"+
		i.IOMMUGroup+"/devices)")
}

// noRemapping tells that interrupts are not confined by the IOMMU and that VFIO was not told to go on
// without that. The kernel says so on x86 only, by the names of its interrupt controllers.
func (s Sysfs) noRemapping() bool {
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "386" {
		return false
	}
	if v := readLine(s.root(), "module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"); v == "Y" || v == "1" {
		return false
	}
	b, err := os.ReadFile(filepath.Join(s.proc(), "interrupts"))
	if err != nil {
		return false
	}
	text := string(b)
	return (strings.Contains(text, "IO-APIC") || strings.Contains(text, "PCI-MSI")) && !strings.Contains(text, " IR-")
}

// hasModule tells whether the running kernel could load a module of that name, or has it built in.
func (s Sysfs) hasModule(name string) bool {
	if s.HasDriver(name) {
		return true
	}
	want := strings.ReplaceAll(name, "-", "_")
	for _, list := range []string{"modules.dep", "modules.builtin"} {
		b, err := os.ReadFile(filepath.Join(s.modules(), list))
		if err != nil {
			continue
		}
		for _, l := range strings.Split(string(b), "\n") {
			if i := strings.IndexByte(l, ':'); i >= 0 {
				l = l[:i]
			}
			base := filepath.Base(l)
			if i := strings.Index(base, ".ko"); i >= 0 && strings.ReplaceAll(base[:i], "-", "_") == want {
				return true
			}
		}
	}
	return false
}

// hasINTx tells whether the function has a line interrupt, which is what uio_pci_generic can use.
func hasINTx(i *Info) bool {
	return len(i.Config) > regInterruptPin && i.Config[regInterruptPin] != 0
}

// regInterruptPin is the register of the header that names the line interrupt; 0: none.
const regInterruptPin = 0x3d

// bind is the command that binds the function to a driver, with what loads the driver before; "" where the
// kernel has no such driver.
func (s Sysfs) bind(i *Info, driver string) string {
	switch {
	case s.HasDriver(driver):
		return BindCommand(i, driver)
	case s.hasModule(driver):
		return "modprobe " + driver + " && " + BindCommand(i, driver)
	}
	return ""
}

// without are the ways to a function that need no VFIO, in words that may follow each other.
func (s Sysfs) without(i *Info) string {
	w := "mode=sysfs works here"
	if i.Driver != "" {
		w += " once it is bound to no driver"
	} else {
		w += ", with no driver"
	}
	w += ", by polling"
	if cmd := s.bind(i, driverUIO); cmd != "" && hasINTx(i) {
		w += "; or, with its line interrupt: " + cmd
	}
	return w
}

// boundTo says what the function is bound to.
func boundTo(i *Info, driver string) string {
	if i.Driver == "" {
		return "is bound to no driver"
	}
	return fmt.Sprintf("is bound to the driver %s, not to %s", i.Driver, driver)
}

// needDriver returns nil where the function is bound to the driver, else the error that tells the command
// that binds it (Unbound), or that there is no such driver (MissingModule).
func (s Sysfs) needDriver(i *Info, driver string) *Error {
	if i.Driver == driver {
		return nil
	}
	e := &Error{Problem: Unbound, Spec: i.Address.String(), Reason: boundTo(i, driver), Mend: s.bind(i, driver)}
	switch {
	case s.HasDriver(driver):
	case e.Mend != "":
		e.Problem = MissingModule
		e.Reason += ", and the kernel has no driver " + driver + " loaded"
	default:
		e.Problem = MissingModule
		e.Reason += ", and this kernel has no driver " + driver + " (none is loaded, " + s.modules() + " lists none)"
		e.Mend = s.without(i)
	}
	return e
}

// vfioDriver is needDriver for vfio-pci, which takes functions behind an IOMMU only, unless it was told
// otherwise.
func (s Sysfs) vfioDriver(i *Info) *Error {
	if i.Driver == driverVFIO && i.IOMMUGroup != "" {
		return nil
	}
	if i.IOMMUGroup == "" && !s.unsafeNoIOMMU() {
		return s.noIOMMU(i)
	}
	e := s.needDriver(i, driverVFIO)
	if e != nil && i.IOMMUGroup == "" {
		e.Mend = s.without(i) + "; or, with nothing that confines the board: " + e.Mend
	}
	return e
}

// unsafeNoIOMMU tells whether vfio-pci takes functions without an IOMMU.
func (s Sysfs) unsafeNoIOMMU() bool {
	v := readLine(s.root(), noIOMMUParameter)
	return v == "Y" || v == "1"
}

const noIOMMUParameter = "module/vfio/parameters/enable_unsafe_noiommu_mode"

// noIOMMU is why vfio-pci does not take a function that is in no IOMMU group. What works as the machine
// stands comes first.
func (s Sysfs) noIOMMU(i *Info) *Error {
	if i.NoIOMMUGroup {
		return &Error{
			Problem: NoIOMMU, Spec: i.Address.String(), Reason: "is behind no IOMMU",
			Mend: "mode=noiommu opens it so, with nothing that confines the board",
		}
	}
	e := &Error{Problem: NoIOMMU, Spec: i.Address.String(), Reason: "is behind no IOMMU, so that vfio-pci does not take it"}
	if i.Driver != driverVFIO {
		e.Reason = boundTo(i, driverVFIO) + ", and is behind no IOMMU, so that vfio-pci does not take it"
	}
	e.Mend = s.without(i) + "; for vfio-pci turn the IOMMU on"
	if runtime.GOARCH == "amd64" || runtime.GOARCH == "386" {
		e.Mend += " (intel_iommu=on or amd_iommu=on on the kernel's command line)"
	}
	if v := readLine(s.root(), noIOMMUParameter); v == "N" || v == "0" {
		e.Problem = NoIOMMUDisabled
		e.Mend += ", or do without its protection: echo 1 > /sys/" + noIOMMUParameter
	}
	return e
}
