//go:build gc

#include "textflag.h"

// Plain LDR and STR with a base register only: no pairs and no write-back, which a
// hypervisor cannot emulate on a trapped device page.

// func Load8(p unsafe.Pointer) uint8
TEXT ·Load8(SB), NOSPLIT, $0-9
	MOVD p+0(FP), R0
	MOVBU (R0), R1
	MOVB R1, ret+8(FP)
	RET

// func Load16(p unsafe.Pointer) uint16
TEXT ·Load16(SB), NOSPLIT, $0-10
	MOVD p+0(FP), R0
	MOVHU (R0), R1
	MOVH R1, ret+8(FP)
	RET

// func Load32(p unsafe.Pointer) uint32
TEXT ·Load32(SB), NOSPLIT, $0-12
	MOVD p+0(FP), R0
	MOVWU (R0), R1
	MOVW R1, ret+8(FP)
	RET

// func Load64(p unsafe.Pointer) uint64
TEXT ·Load64(SB), NOSPLIT, $0-16
	MOVD p+0(FP), R0
	MOVD (R0), R1
	MOVD R1, ret+8(FP)
	RET

// func Store8(p unsafe.Pointer, v uint8)
TEXT ·Store8(SB), NOSPLIT, $0-9
	MOVD p+0(FP), R0
	MOVBU v+8(FP), R1
	MOVB R1, (R0)
	RET

// func Store16(p unsafe.Pointer, v uint16)
TEXT ·Store16(SB), NOSPLIT, $0-10
	MOVD p+0(FP), R0
	MOVHU v+8(FP), R1
	MOVH R1, (R0)
	RET

// func Store32(p unsafe.Pointer, v uint32)
TEXT ·Store32(SB), NOSPLIT, $0-12
	MOVD p+0(FP), R0
	MOVWU v+8(FP), R1
	MOVW R1, (R0)
	RET

// func Store64(p unsafe.Pointer, v uint64)
TEXT ·Store64(SB), NOSPLIT, $0-16
	MOVD p+0(FP), R0
	MOVD v+8(FP), R1
	MOVD R1, (R0)
	RET

// func copyWords(dst, src unsafe.Pointer, words uint64)
TEXT ·copyWords(SB), NOSPLIT, $0-24
	MOVD dst+0(FP), R0
	MOVD src+8(FP), R1
	MOVD words+16(FP), R2

four:
	CMP  $4, R2
	BLO  one
	MOVD (R1), R3
	MOVD 8(R1), R4
	MOVD 16(R1), R5
	MOVD 24(R1), R6
	MOVD R3, (R0)
	MOVD R4, 8(R0)
	MOVD R5, 16(R0)
	MOVD R6, 24(R0)
	ADD  $32, R0
	ADD  $32, R1
	SUB  $4, R2
	B    four

one:
	CBZ  R2, done
	MOVD (R1), R3
	MOVD R3, (R0)
	ADD  $8, R0
	ADD  $8, R1
	SUB  $1, R2
	B    one

done:
	RET

// func zeroWords(dst unsafe.Pointer, words uint64)
TEXT ·zeroWords(SB), NOSPLIT, $0-16
	MOVD dst+0(FP), R0
	MOVD words+8(FP), R2

loop:
	CBZ  R2, done
	MOVD ZR, (R0)
	ADD  $8, R0
	SUB  $1, R2
	B    loop

done:
	RET

// Between processors: the inner shareable domain. A load barrier holds back every later
// access; releasing needs the full one, since a store barrier would let earlier loads
// pass the publishing store.

// func weakRead()
TEXT ·weakRead(SB), NOSPLIT, $0-0
	DMB $0x9 // ISHLD
	RET

// func weakWrite()
TEXT ·weakWrite(SB), NOSPLIT, $0-0
	DMB $0xb // ISH
	RET

// func weakFull()
TEXT ·weakFull(SB), NOSPLIT, $0-0
	DMB $0xb // ISH
	RET

// Towards devices: the outer shareable domain, to which device and uncached memory
// always belong. The full barrier waits for completion (DSB), so that a store has
// left before anything later starts.

// func strongRead()
TEXT ·strongRead(SB), NOSPLIT, $0-0
	DMB $0x1 // OSHLD
	RET

// func strongWrite()
TEXT ·strongWrite(SB), NOSPLIT, $0-0
	DMB $0x3 // OSH
	RET

// func strongFull()
TEXT ·strongFull(SB), NOSPLIT, $0-0
	DSB $0xf // SY
	RET
