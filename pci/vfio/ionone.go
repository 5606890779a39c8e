//go:build !(ppc || ppc64 || ppc64le || mips || mipsle || mips64 || mips64le || sparc || sparc64 || alpha)

package vfio

// ioNone is what _IO puts in for "no data" (include/uapi/asm-generic/ioctl.h).
const ioNone = 0
