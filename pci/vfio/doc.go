// Package vfio opens PCI functions through the kernel's VFIO: behind an IOMMU (type 1, or sPAPR TCE on POWER), or
// without one where the operator allows it. Importing it registers the modes "vfio" and "noiommu" with package pci.
//
// In the room: containers, groups, devices, their regions, interrupts and DMA maps, after
// Linux' include/uapi/linux/vfio.h and Documentation/driver-api/vfio.rst. Never in it: what a
// BAR's registers mean; other ways to a function.
//
// The kernel undoes everything when the process ends, however it ends: interrupts, bus mastering, DMA
// maps, and the function is reset.
package vfio
