//go:build gc

#include "textflag.h"

// Plain MOVs only: XCHG would lock the bus on uncached memory.

// func Load8(p unsafe.Pointer) uint8
TEXT ·Load8(SB), NOSPLIT, $0-9
	MOVQ p+0(FP), AX
	MOVB (AX), BX
	MOVB BX, ret+8(FP)
	RET

// func Load16(p unsafe.Pointer) uint16
TEXT ·Load16(SB), NOSPLIT, $0-10
	MOVQ p+0(FP), AX
	MOVW (AX), BX
	MOVW BX, ret+8(FP)
	RET

// func Load32(p unsafe.Pointer) uint32
TEXT ·Load32(SB), NOSPLIT, $0-12
	MOVQ p+0(FP), AX
	MOVL (AX), BX
	MOVL BX, ret+8(FP)
	RET

// func Load64(p unsafe.Pointer) uint64
TEXT ·Load64(SB), NOSPLIT, $0-16
	MOVQ p+0(FP), AX
	MOVQ (AX), BX
	MOVQ BX, ret+8(FP)
	RET

// func Store8(p unsafe.Pointer, v uint8)
TEXT ·Store8(SB), NOSPLIT, $0-9
	MOVQ p+0(FP), AX
	MOVB v+8(FP), BX
	MOVB BX, (AX)
	RET

// func Store16(p unsafe.Pointer, v uint16)
TEXT ·Store16(SB), NOSPLIT, $0-10
	MOVQ p+0(FP), AX
	MOVW v+8(FP), BX
	MOVW BX, (AX)
	RET

// func Store32(p unsafe.Pointer, v uint32)
TEXT ·Store32(SB), NOSPLIT, $0-12
	MOVQ p+0(FP), AX
	MOVL v+8(FP), BX
	MOVL BX, (AX)
	RET

// func Store64(p unsafe.Pointer, v uint64)
TEXT ·Store64(SB), NOSPLIT, $0-16
	MOVQ p+0(FP), AX
	MOVQ v+8(FP), BX
	MOVQ BX, (AX)
	RET

// Between processors x86 keeps loads in order with loads, and stores behind all
// that came before; only the compiler must be held off, which the call does.

// func weakRead()
TEXT ·weakRead(SB), NOSPLIT, $0-0
	RET

// func weakWrite()
TEXT ·weakWrite(SB), NOSPLIT, $0-0
	RET

// A locked addition of nothing to the stack drains the store buffer in a quarter
// of MFENCE's time.

// func weakFull()
TEXT ·weakFull(SB), NOSPLIT, $0-0
	LOCK
	ADDL $0, (SP)
	RET

// Loads from write-combining memory are weakly ordered: LFENCE. Uncached ones
// would not need it, but it costs nothing beside them.

// func strongRead()
TEXT ·strongRead(SB), NOSPLIT, $0-0
	LFENCE
	RET

// SFENCE empties the write-combining buffers before any later store.

// func strongWrite()
TEXT ·strongWrite(SB), NOSPLIT, $0-0
	SFENCE
	RET

// func strongFull()
TEXT ·strongFull(SB), NOSPLIT, $0-0
	MFENCE
	RET
