//go:build gc && (ppc64 || ppc64le)

#include "textflag.h"

// On the big-endian machine the byte-reversing loads and stores (lhbrx, stwbrx, ...):
// one access each, as the plain ones.
#ifdef GOARCH_ppc64
#define LD16 MOVHBR
#define LD32 MOVWBR
#define LD64 MOVDBR
#define ST16 MOVHBR
#define ST32 MOVWBR
#define ST64 MOVDBR
#else
#define LD16 MOVHZ
#define LD32 MOVWZ
#define LD64 MOVD
#define ST16 MOVH
#define ST32 MOVW
#define ST64 MOVD
#endif

// func Load8(p unsafe.Pointer) uint8
TEXT ·Load8(SB), NOSPLIT, $0-9
	MOVD p+0(FP), R3
	MOVBZ (R3), R4
	MOVB R4, ret+8(FP)
	RET

// func Load16(p unsafe.Pointer) uint16
TEXT ·Load16(SB), NOSPLIT, $0-10
	MOVD p+0(FP), R3
	LD16 (R3), R4
	MOVH R4, ret+8(FP)
	RET

// func Load32(p unsafe.Pointer) uint32
TEXT ·Load32(SB), NOSPLIT, $0-12
	MOVD p+0(FP), R3
	LD32 (R3), R4
	MOVW R4, ret+8(FP)
	RET

// func Load64(p unsafe.Pointer) uint64
TEXT ·Load64(SB), NOSPLIT, $0-16
	MOVD p+0(FP), R3
	LD64 (R3), R4
	MOVD R4, ret+8(FP)
	RET

// func Store8(p unsafe.Pointer, v uint8)
TEXT ·Store8(SB), NOSPLIT, $0-9
	MOVD p+0(FP), R3
	MOVBZ v+8(FP), R4
	MOVB R4, (R3)
	RET

// func Store16(p unsafe.Pointer, v uint16)
TEXT ·Store16(SB), NOSPLIT, $0-10
	MOVD p+0(FP), R3
	MOVHZ v+8(FP), R4
	ST16 R4, (R3)
	RET

// func Store32(p unsafe.Pointer, v uint32)
TEXT ·Store32(SB), NOSPLIT, $0-12
	MOVD p+0(FP), R3
	MOVWZ v+8(FP), R4
	ST32 R4, (R3)
	RET

// func Store64(p unsafe.Pointer, v uint64)
TEXT ·Store64(SB), NOSPLIT, $0-16
	MOVD p+0(FP), R3
	MOVD v+8(FP), R4
	ST64 R4, (R3)
	RET

// func copyWords(dst, src unsafe.Pointer, words uint64)
TEXT ·copyWords(SB), NOSPLIT, $0-24
	MOVD dst+0(FP), R3
	MOVD src+8(FP), R4
	MOVD words+16(FP), R5

four:
	CMPU R5, $4
	BLT  one
	MOVD (R4), R6
	MOVD 8(R4), R7
	MOVD 16(R4), R8
	MOVD 24(R4), R9
	MOVD R6, (R3)
	MOVD R7, 8(R3)
	MOVD R8, 16(R3)
	MOVD R9, 24(R3)
	ADD  $32, R3
	ADD  $32, R4
	ADD  $-4, R5
	BR   four

one:
	CMPU R5, $0
	BEQ  done
	MOVD (R4), R6
	MOVD R6, (R3)
	ADD  $8, R3
	ADD  $8, R4
	ADD  $-1, R5
	BR   one

done:
	RET

// func zeroWords(dst unsafe.Pointer, words uint64)
TEXT ·zeroWords(SB), NOSPLIT, $0-16
	MOVD dst+0(FP), R3
	MOVD words+8(FP), R5

loop:
	CMPU R5, $0
	BEQ  done
	MOVD R0, (R3)
	ADD  $8, R3
	ADD  $-1, R5
	BR   loop

done:
	RET

// LWSYNC orders all but a store before a load, in cached memory only.

// func weakRead()
TEXT ·weakRead(SB), NOSPLIT, $0-0
	LWSYNC
	RET

// func weakWrite()
TEXT ·weakWrite(SB), NOSPLIT, $0-0
	LWSYNC
	RET

// func weakFull()
TEXT ·weakFull(SB), NOSPLIT, $0-0
	SYNC
	RET

// SYNC alone orders cached against caching-inhibited memory.

// func strongRead()
TEXT ·strongRead(SB), NOSPLIT, $0-0
	SYNC
	RET

// func strongWrite()
TEXT ·strongWrite(SB), NOSPLIT, $0-0
	SYNC
	RET

// func strongFull()
TEXT ·strongFull(SB), NOSPLIT, $0-0
	SYNC
	RET
