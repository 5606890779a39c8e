//go:build gc

#include "textflag.h"

// func cpuid(leaf, sub uint32) (a, b, c, d uint32)
TEXT ·cpuid(SB), NOSPLIT, $0-24
	MOVL leaf+0(FP), AX
	MOVL sub+4(FP), CX
	CPUID
	MOVL AX, a+8(FP)
	MOVL BX, b+12(FP)
	MOVL CX, c+16(FP)
	MOVL DX, d+20(FP)
	RET

// func xgetbv() uint32
TEXT ·xgetbv(SB), NOSPLIT, $0-4
	XORL CX, CX
	XGETBV
	MOVL AX, ret+0(FP)
	RET

// Device memory is on one side, always aligned: the instructions that fault on anything else are used there.

// func loadWide(dst, src unsafe.Pointer, n, width uint64)
//
// The streaming load buffers are not snooped: what another agent wrote since a line was fetched into one is seen only behind a
// fence (Intel SDM volume 1, 12.10.3). The loads are not to pass what came before them either.
TEXT ·loadWide(SB), NOSPLIT, $0-32
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
	MOVQ width+24(FP), DX
	MFENCE
	CMPQ DX, $32
	JEQ  ymm
	JHI  zmm

xmm4:
	CMPQ     CX, $64
	JCS      xmm1
	MOVNTDQA (SI), X0
	MOVNTDQA 16(SI), X1
	MOVNTDQA 32(SI), X2
	MOVNTDQA 48(SI), X3
	MOVOU    X0, (DI)
	MOVOU    X1, 16(DI)
	MOVOU    X2, 32(DI)
	MOVOU    X3, 48(DI)
	ADDQ     $64, SI
	ADDQ     $64, DI
	SUBQ     $64, CX
	JMP      xmm4

xmm1:
	TESTQ    CX, CX
	JZ       done
	MOVNTDQA (SI), X0
	MOVOU    X0, (DI)
	ADDQ     $16, SI
	ADDQ     $16, DI
	SUBQ     $16, CX
	JMP      xmm1

done:
	RET

ymm:
	VMOVNTDQA (SI), Y0
	VMOVDQU   Y0, (DI)
	ADDQ      $32, SI
	ADDQ      $32, DI
	SUBQ      $32, CX
	JNZ       ymm
	VZEROUPPER
	RET

zmm:
	VMOVNTDQA (SI), Z0
	VMOVDQU64 Z0, (DI)
	ADDQ      $64, SI
	ADDQ      $64, DI
	SUBQ      $64, CX
	JNZ       zmm
	VZEROUPPER
	RET

// func storeWide(dst, src unsafe.Pointer, n, width uint64)
TEXT ·storeWide(SB), NOSPLIT, $0-32
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
	MOVQ width+24(FP), DX
	CMPQ DX, $32
	JEQ  ymm
	JHI  zmm

xmm4:
	CMPQ   CX, $64
	JCS    xmm1
	MOVOU  (SI), X0
	MOVOU  16(SI), X1
	MOVOU  32(SI), X2
	MOVOU  48(SI), X3
	MOVAPS X0, (DI)
	MOVAPS X1, 16(DI)
	MOVAPS X2, 32(DI)
	MOVAPS X3, 48(DI)
	ADDQ   $64, SI
	ADDQ   $64, DI
	SUBQ   $64, CX
	JMP    xmm4

xmm1:
	TESTQ  CX, CX
	JZ     done
	MOVOU  (SI), X0
	MOVAPS X0, (DI)
	ADDQ   $16, SI
	ADDQ   $16, DI
	SUBQ   $16, CX
	JMP    xmm1

done:
	RET

ymm:
	VMOVDQU (SI), Y0
	VMOVDQA Y0, (DI)
	ADDQ    $32, SI
	ADDQ    $32, DI
	SUBQ    $32, CX
	JNZ     ymm
	VZEROUPPER
	RET

zmm:
	VMOVDQU64 (SI), Z0
	VMOVDQA64 Z0, (DI)
	ADDQ      $64, SI
	ADDQ      $64, DI
	SUBQ      $64, CX
	JNZ       zmm
	VZEROUPPER
	RET
