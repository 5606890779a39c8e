//go:build ppc || ppc64 || ppc64le || mips || mipsle || mips64 || mips64le || sparc || sparc64 || alpha

package vfio

// ioNone is what _IO puts in for "no data": 1 in the top three bits
// (arch/powerpc/include/uapi/asm/ioctl.h, and the same for MIPS, SPARC and Alpha).
const ioNone = 0x20000000
