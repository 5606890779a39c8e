package mpc83xx

import "github.com/boardlink/boardlink/pci"

// InterruptsOf is the kind of interrupt that the host's argument has the function opened for.
func InterruptsOf(arg string) (pci.InterruptKind, error) {
	a, _, err := parseHost(arg)
	return a.Interrupts, err
}
