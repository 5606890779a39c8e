//go:build !gc || !(amd64 || arm64 || arm.7 || ppc64 || ppc64le || riscv64)

package mmio

import "sync/atomic"

// fenceWord is for fence alone, a cache line of its own. (A local word would be allocated
// at each call by gccgo.)
var fenceWord struct {
	_    [64]byte
	word uint32
	_    [60]byte
}

// fence is a read-modify-write of a word that nobody reads: sync/atomic makes it a full
// barrier (386: LOCK XADD, which empties the write-combining buffers too; gccgo: a
// sequentially consistent __atomic operation, on PowerPC with sync in front; arm
// before v7: the kernel's helper).
//
//go:noinline
func fence() {
	atomic.AddUint32(&fenceWord.word, 1)
}

func weakRead()    { fence() }
func weakWrite()   { fence() }
func weakFull()    { fence() }
func strongRead()  { fence() }
func strongWrite() { fence() }
func strongFull()  { fence() }
