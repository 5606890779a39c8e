//go:build linux

// Package models is chips and boards for tests, register by register: what a program reads and writes through
// mmio lands in a model, interrupts arrive as file descriptors that poll. The kinds of board run on them as
// they are.
//
// In the room: a PCI function over modelled BARs (Function), level interrupts (Line), memory that refuses what device
// memory does not tolerate (Memory), Freescale's MPC8349 as a PCI agent (MPC8349), a made-up board with
// everything that is unpleasant (Synth). Never in it: kinds of board, links, packets.
//
// # What a model shows
//
// That the program does what the model's author understood of the chip. Both were written from the same sources: a
// model is no proof that silicon agrees. Accesses take effect at once; posted writes that are under way are package
// testboard's matter.
//
// Misuse (an access of a width that the chip does not take, a register that belongs to the other side) is recorded and
// read as all-ones; tests end with Err.
package models

import (
	"errors"
	"fmt"
	"strings"
	"sync"
)

// faults is a list of misuse.
type faults struct {
	mu   sync.Mutex
	list []string
	n    int
}

const maxFaults = 20

func (f *faults) add(format string, args ...interface{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n++; len(f.list) < maxFaults {
		f.list = append(f.list, fmt.Sprintf(format, args...))
	}
}

// Err returns nil, or an error that lists the first misuses.
func (f *faults) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n == 0 {
		return nil
	}
	return errors.New(fmt.Sprintf("%d bad accesses: ", f.n) + strings.Join(f.list, "; "))
}

// ones is what a load of that many bytes reads where nobody answers.
func ones(width uint) uint64 {
	if width >= 8 {
		return ^uint64(0)
	}
	return 1<<(8*width) - 1
}

func swap32(v uint32) uint32 {
	return v<<24 | v<<8&0xff0000 | v>>8&0xff00 | v>>24
}
