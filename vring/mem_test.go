package vring_test

import (
	"testing"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring/vringtest"
)

func busMemory(bus *vringtest.Bus) func(testing.TB, int) mmio.Mem {
	return func(tb testing.TB, n int) mmio.Mem { return mmio.NewBusMem(bus, uint64(n), mmio.Uncached) }
}
