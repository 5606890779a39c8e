// Package pci is PCI functions as a user-space program sees them: what sysfs tells about
// them, and one small interface, Function, for one that was opened.
//
// In the room: addresses, the sysfs reader (BARs, capabilities, driver, IOMMU group; bind,
// reset, remove, rescan), the Function interface with the registry of its implementations, the
// errors that say which piece of the kernel is missing and which command mends it, and Guard,
// which turns a bus fault on a mapping into an error. Below it pci/vfio and pci/uio, which open functions,
// and pci/scan, which names them for people. Never in it: what a BAR's registers mean, kinds of board, rings.
//
// Rooms of one floor do not know each other: the Waiter here is doorbell.Waiter by structure.
package pci
