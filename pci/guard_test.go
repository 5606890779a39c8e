package pci_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// mapping is two pages of a file that can be shortened under us: SIGBUS, as a bus error is.
func mapping(t *testing.T) (mem mmio.Mem, cut func()) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "m"))
	if err != nil {
		t.Fatal(err)
	}
	size := 2 * os.Getpagesize()
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	release := pci.GuardRange(uintptr(unsafe.Pointer(&b[0])), uint64(size), "0000:00:04.0 BAR 2")
	t.Cleanup(func() { release(); unix.Munmap(b); f.Close() })
	return mmio.NewMem(unsafe.Pointer(&b[0]), uint64(size), mmio.Uncached), func() {
		if err := f.Truncate(0); err != nil {
			t.Error(err)
		}
	}
}

func TestGuard(t *testing.T) {
	mem, cut := mapping(t)
	if err := pci.Guard(func() { mem.Store64(8, 1) }); err != nil {
		t.Fatal(err)
	}
	cut()
	var mu sync.Mutex
	buf := make([]byte, 64)
	for name, f := range map[string]func(){
		"load 8":   func() { mem.Load8(4097) },
		"load 32":  func() { mem.Load32(8) },
		"load 64":  func() { mem.Load64(8) },
		"store 16": func() { mem.Store16(8, 1) },
		"store 64": func() { mem.Store64(8, 1) },
		"copy out": func() { mem.CopyOut(buf, 3) },
		"copy in":  func() { mem.CopyIn(3, buf) },
		"under a lock": func() {
			mu.Lock()
			defer mu.Unlock()
			mem.Load32(8)
		},
		"nested": func() {
			if err := pci.Guard(func() {}); err != nil {
				t.Error(err)
			}
			mem.Load32(8)
		},
	} {
		err := pci.Guard(f)
		var fe *pci.FaultError
		if !errors.As(err, &fe) || !errors.Is(err, pci.ErrGone) {
			t.Errorf("%s: %v", name, err)
		} else if fe.Addr == 0 && !told {
			// Guard had to do without.
		} else if !strings.Contains(err.Error(), "0000:00:04.0 BAR 2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !mu.TryLock() {
		t.Error("a lock that defer should have freed is held")
	}
	if debug.SetPanicOnFault(false) {
		t.Error("the guard left the goroutine changed")
	}
}

// told is whether the kernel tells the address of a fault, for sure: emulators of foreign processors may not.
const told = runtime.GOARCH == "amd64" || runtime.GOARCH == "386"

// TestGuardIsNarrow: only a fault in a registered range is a lost board.
func TestGuardIsNarrow(t *testing.T) {
	page := os.Getpagesize()
	b, err := unix.Mmap(-1, 0, page, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	foreign := mmio.NewMem(unsafe.Pointer(&b[0]), uint64(page), mmio.Uncached)
	var nilMap map[string]int
	var nilPointer *int
	for name, f := range map[string]func(){
		"a fault elsewhere": func() {
			if !told {
				panic("package mmio at an unknown address counts as a board")
			}
			foreign.Load32(0)
		},
		"nil pointer": func() { *nilPointer = 1 },
		"nil map":     func() { nilMap["x"] = 1 },
		"a panic":     func() { panic("x") },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: Guard swallowed it", name)
				}
			}()
			pci.Guard(f)
		}()
	}
	if debug.SetPanicOnFault(false) {
		t.Error("the guard left the goroutine changed")
	}
}

func BenchmarkGuard(b *testing.B) {
	f := func() {}
	for b.Loop() {
		if err := pci.Guard(f); err != nil {
			b.Fatal(err)
		}
	}
}
