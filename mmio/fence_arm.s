//go:build gc && arm.7

#include "textflag.h"

// The barriers of ARMv7 by their encoding. sync/atomic has DMB ISH only, which says nothing
// about devices.

// func weakRead()
TEXT ·weakRead(SB), NOSPLIT, $0-0
	WORD $0xf57ff05b // DMB ISH
	RET

// func weakWrite()
TEXT ·weakWrite(SB), NOSPLIT, $0-0
	WORD $0xf57ff05b // DMB ISH
	RET

// func weakFull()
TEXT ·weakFull(SB), NOSPLIT, $0-0
	WORD $0xf57ff05b // DMB ISH
	RET

// func strongRead()
TEXT ·strongRead(SB), NOSPLIT, $0-0
	WORD $0xf57ff04f // DSB SY
	RET

// func strongWrite()
TEXT ·strongWrite(SB), NOSPLIT, $0-0
	WORD $0xf57ff04f // DSB SY
	RET

// func strongFull()
TEXT ·strongFull(SB), NOSPLIT, $0-0
	WORD $0xf57ff04f // DSB SY
	RET
