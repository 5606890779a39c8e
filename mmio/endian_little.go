//go:build !(armbe || arm64be || m68k || mips || mips64 || mips64p32 || ppc || ppc64 || s390 || s390x || shbe || sparc || sparc64)

package mmio

// bigEndian tells that the processor's numbers stand in memory with the high
// byte first, and so need a swap.
const bigEndian = false
