//go:build gc && (amd64 || arm64 || arm.7 || ppc64 || ppc64le || riscv64)

package mmio

// The barriers between processors, for cached memory. The call alone keeps the
// compiler from moving accesses across.

func weakRead()
func weakWrite()
func weakFull()

// The barriers towards devices.

func strongRead()
func strongWrite()
func strongFull()
