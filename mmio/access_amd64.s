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

// func copyWords(dst, src unsafe.Pointer, words uint64)
//
// From 48 words on a string move, as Linux' memcpy_toio and memcpy_fromio: on uncached memory the
// processor makes one access of 8 bytes for each word, upwards; elsewhere it may
// gather them (Intel SDM volume 1, 7.3.9.3, "Fast-String Operation"; AMD64 APM volume 2, 7.4). What
// follows the move is ordered behind all of it. Go keeps the direction flag clear.
TEXT ·copyWords(SB), NOSPLIT, $0-24
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ words+16(FP), CX
	CMPQ CX, $48
	JCS  four
	REP
	MOVSQ
	RET

four:
	CMPQ CX, $4
	JCS  one
	MOVQ (SI), R8
	MOVQ 8(SI), R9
	MOVQ 16(SI), R10
	MOVQ 24(SI), R11
	MOVQ R8, (DI)
	MOVQ R9, 8(DI)
	MOVQ R10, 16(DI)
	MOVQ R11, 24(DI)
	ADDQ $32, SI
	ADDQ $32, DI
	SUBQ $4, CX
	JMP  four

one:
	TESTQ CX, CX
	JZ    done
	MOVQ  (SI), R8
	MOVQ  R8, (DI)
	ADDQ  $8, SI
	ADDQ  $8, DI
	DECQ  CX
	JMP   one

done:
	RET

// func zeroWords(dst unsafe.Pointer, words uint64)
TEXT ·zeroWords(SB), NOSPLIT, $0-16
	MOVQ dst+0(FP), DI
	MOVQ words+8(FP), CX
	XORL AX, AX

loop:
	TESTQ CX, CX
	JZ    done
	MOVQ  AX, (DI)
	ADDQ  $8, DI
	DECQ  CX
	JMP   loop

done:
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
