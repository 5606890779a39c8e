package vm

import (
	"fmt"
	"strings"
)

// Ivshmem is an ivshmem-doorbell function (1af4:1110): BAR0 registers, BAR1 MSI-X, BAR2 the server's memory.
type Ivshmem struct {
	// ID is QEMU's name of it: "board0".
	ID string
	// Socket is the ivshmem server's, such as board/loopback's.
	Socket string
	// Vectors is the number of MSI-X vectors and doorbells; 0 means 4. The server must have as many.
	Vectors int
	// Addr is its slot on the bus, such as "0x4"; empty takes a free one.
	Addr string
	// Port, if not empty, is the root port that it is plugged into, which the standard
	// machines add: hot-plug needs one.
	Port string
	// Empty leaves the root port empty; PlugIvshmem fills it later.
	Empty bool
	// Reserve is the prefetchable space of the root port in MiB, which bounds the memory's size; 0 means 64.
	Reserve int
}

func (d Ivshmem) chardev() string { return d.ID + "-chr" }

func (d Ivshmem) bus() string { return d.Port }

func (d Ivshmem) vectors() int {
	if d.Vectors == 0 {
		return 4
	}
	return d.Vectors
}

// args are QEMU's options; port is the root port's number.
func (d Ivshmem) args(port int) []string {
	var out []string
	if d.Port != "" {
		r := d.Reserve
		if r == 0 {
			r = 64
		}
		// Slots from 0x10 up: QEMU gives the lower ones to devices without an address.
		out = append(out, "-device", fmt.Sprintf("pcie-root-port,id=%s,bus=pcie.0,chassis=%d,slot=%d,addr=0x%x,pref64-reserve=%dM,mem-reserve=2M",
			d.Port, port+1, port+1, 0x10+port, r))
		if d.Empty {
			return out
		}
	}
	dev := fmt.Sprintf("ivshmem-doorbell,id=%s,vectors=%d,chardev=%s", d.ID, d.vectors(), d.chardev())
	if d.bus() != "" {
		dev += ",bus=" + d.bus()
	}
	if d.Addr != "" {
		dev += ",addr=" + d.Addr
	}
	return append(out, "-chardev", "socket,id="+d.chardev()+",path="+strings.ReplaceAll(d.Socket, ",", ",,"), "-device", dev)
}

func ivshmemArgs(boards []Ivshmem) []string {
	var out []string
	for i, b := range boards {
		out = append(out, b.args(i)...)
	}
	return out
}

// VFIOModules are what VFIO needs on x86; bind a function by its driver_override.
var VFIOModules = []string{"vfio_iommu_type1", "vfio_pci"}

// VFIOModulesPPC are what VFIO needs on pseries.
var VFIOModulesPPC = []string{"vfio_iommu_spapr_tce", "vfio_pci"}

// UIOModules are what UIO needs.
var UIOModules = []string{"uio_pci_generic"}

// NetModules are what tap and tun interfaces, and pairs of interfaces, need.
var NetModules = []string{"tun", "veth"}

// Edu is QEMU's educational device (1234:11e8, QEMU's docs/specs/edu.txt): a DMA engine, MSI and INTx. QEMU 7.2
// dies at a transfer of 4096 bytes; 4088 work.
var Edu = []string{"-device", "edu,id=edu"}

// Carrier is an x86 carrier with an IOMMU, edu, the boards, and all modules.
func Carrier(boards ...Ivshmem) Config {
	return Config{Name: "carrier", Kernel: Linux612, IOMMU: true,
		Devices: append(ivshmemArgs(boards), Edu...),
		Modules: modules(VFIOModules, UIOModules, NetModules)}
}

// Plain is an x86 machine without an IOMMU, with edu, the boards, and UIO: a carrier that has none, or a
// board that is an x86 machine.
func Plain(boards ...Ivshmem) Config {
	return Config{Name: "plain", Kernel: Linux612,
		Devices: append(ivshmemArgs(boards), Edu...),
		Modules: modules(UIOModules, NetModules)}
}

// NoIOMMU is Plain with VFIO's mode for machines without an IOMMU, which takes a module that is built
// from Debian's kernel source the first time.
func NoIOMMU(boards ...Ivshmem) Config {
	c := Plain(boards...)
	k := *Linux612
	k.NoIOMMU = true
	c.Name, c.Kernel = "noiommu", &k
	c.Modules = modules([]string{"vfio enable_unsafe_noiommu_mode=1"}, VFIOModules, UIOModules, NetModules)
	return c
}

// Pseries is a little-endian POWER machine with the boards: a board, or a carrier with VFIO on
// the sPAPR TCE IOMMU. It has no root ports: Ivshmem.Port is not for it.
func Pseries(boards ...Ivshmem) Config {
	return Config{Name: "pseries", Kernel: Linux612PPC,
		Devices: ivshmemArgs(boards),
		Modules: modules(VFIOModulesPPC, UIOModules, NetModules)}
}

func modules(lists ...[]string) []string {
	var out []string
	for _, l := range lists {
		out = append(out, l...)
	}
	return out
}
