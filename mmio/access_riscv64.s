//go:build gc

#include "textflag.h"

// func Load8(p unsafe.Pointer) uint8
TEXT ·Load8(SB), NOSPLIT, $0-9
	MOV p+0(FP), X5
	MOVBU (X5), X6
	MOVB X6, ret+8(FP)
	RET

// func Load16(p unsafe.Pointer) uint16
TEXT ·Load16(SB), NOSPLIT, $0-10
	MOV p+0(FP), X5
	MOVHU (X5), X6
	MOVH X6, ret+8(FP)
	RET

// func Load32(p unsafe.Pointer) uint32
TEXT ·Load32(SB), NOSPLIT, $0-12
	MOV p+0(FP), X5
	MOVWU (X5), X6
	MOVW X6, ret+8(FP)
	RET

// func Load64(p unsafe.Pointer) uint64
TEXT ·Load64(SB), NOSPLIT, $0-16
	MOV p+0(FP), X5
	MOV (X5), X6
	MOV X6, ret+8(FP)
	RET

// func Store8(p unsafe.Pointer, v uint8)
TEXT ·Store8(SB), NOSPLIT, $0-9
	MOV p+0(FP), X5
	MOVBU v+8(FP), X6
	MOVB X6, (X5)
	RET

// func Store16(p unsafe.Pointer, v uint16)
TEXT ·Store16(SB), NOSPLIT, $0-10
	MOV p+0(FP), X5
	MOVHU v+8(FP), X6
	MOVH X6, (X5)
	RET

// func Store32(p unsafe.Pointer, v uint32)
TEXT ·Store32(SB), NOSPLIT, $0-12
	MOV p+0(FP), X5
	MOVWU v+8(FP), X6
	MOVW X6, (X5)
	RET

// func Store64(p unsafe.Pointer, v uint64)
TEXT ·Store64(SB), NOSPLIT, $0-16
	MOV p+0(FP), X5
	MOV v+8(FP), X6
	MOV X6, (X5)
	RET

// func copyWords(dst, src unsafe.Pointer, words uint64)
TEXT ·copyWords(SB), NOSPLIT, $0-24
	MOV dst+0(FP), X5
	MOV src+8(FP), X6
	MOV words+16(FP), X7
	MOV $4, X12

four:
	BLTU X7, X12, one
	MOV  (X6), X8
	MOV  8(X6), X9
	MOV  16(X6), X10
	MOV  24(X6), X11
	MOV  X8, (X5)
	MOV  X9, 8(X5)
	MOV  X10, 16(X5)
	MOV  X11, 24(X5)
	ADD  $32, X5
	ADD  $32, X6
	ADD  $-4, X7
	JMP  four

one:
	BEQZ X7, done
	MOV  (X6), X8
	MOV  X8, (X5)
	ADD  $8, X5
	ADD  $8, X6
	ADD  $-1, X7
	JMP  one

done:
	RET

// func zeroWords(dst unsafe.Pointer, words uint64)
TEXT ·zeroWords(SB), NOSPLIT, $0-16
	MOV dst+0(FP), X5
	MOV words+8(FP), X7

loop:
	BEQZ X7, done
	MOV  ZERO, (X5)
	ADD  $8, X5
	ADD  $-1, X7
	JMP  loop

done:
	RET

// The assembler knows FENCE without operands only: the others by their encoding. The
// letters are the accesses that are ordered: r, w in memory, i, o on devices.

// func weakRead()
TEXT ·weakRead(SB), NOSPLIT, $0-0
	WORD $0x0230000f // FENCE r, rw
	RET

// func weakWrite()
TEXT ·weakWrite(SB), NOSPLIT, $0-0
	WORD $0x0310000f // FENCE rw, w
	RET

// func weakFull()
TEXT ·weakFull(SB), NOSPLIT, $0-0
	WORD $0x0330000f // FENCE rw, rw
	RET

// func strongRead()
TEXT ·strongRead(SB), NOSPLIT, $0-0
	WORD $0x0af0000f // FENCE ir, iorw
	RET

// func strongWrite()
TEXT ·strongWrite(SB), NOSPLIT, $0-0
	WORD $0x0f50000f // FENCE iorw, ow
	RET

// func strongFull()
TEXT ·strongFull(SB), NOSPLIT, $0-0
	WORD $0x0ff0000f // FENCE iorw, iorw
	RET
