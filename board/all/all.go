// Package all has every kind of board, and every way to open a PCI function: a program that imports it opens all that
// docs/boards.md describes. A new kind is one line here.
//
// It must not know anything but the list.
package all

import (
	_ "github.com/boardlink/boardlink/board/generic"  // kinds of board register themselves
	_ "github.com/boardlink/boardlink/board/ivshmem"  //
	_ "github.com/boardlink/boardlink/board/loopback" //
	_ "github.com/boardlink/boardlink/board/mpc83xx"  //
	_ "github.com/boardlink/boardlink/pci/uio"        // ways to open a PCI function
	_ "github.com/boardlink/boardlink/pci/vfio"       //
)
