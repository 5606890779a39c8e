//go:build linux

// Package ports tries links between machines of different kinds: each end may be a program for another processor, run by
// an emulator of qemu-user, over the same loopback board (a memfd and eventfds that travel by SCM_RIGHTS), with
// real interfaces and real traffic.
//
// The package imports the standard library only: internal/runtests imports it, and is to start without any module.
//
// In the room: the targets, how programs are built for them. Never in it: how ends, links and traffic work. The
// targets, and what the emulation cannot show, are described in docs/ports.md.
package ports

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// Target is a kind of machine.
type Target struct {
	Name string
	Arch string // GOARCH, of gc or of gccgo
	// Triple is the prefix of gccgo's cross compiler; empty: gc compiles for it, without cgo.
	Triple string
	// Emulator is QEMU's name of the processor; empty: the program runs as it is, where Native is this machine.
	Emulator string
	CPU      string // qemu's -cpu
	Native   string // GOARCH of machines that run it without an emulator
	Machine  elf.Machine
	Data     elf.Data
	// Lean: the programs are boardlink-agent and boardlink-host instead of boardlink.
	Lean bool
	// AgentOnly: it is tried as board only, not as carrier.
	AgentOnly bool
	// Deny are the features that must not be negotiated with the emulated end.
	Deny string
}

// Targets are the kinds of machines that ends run on, the first to fail first.
var Targets = []Target{
	{Name: "ppc64", Arch: "ppc64", Emulator: "ppc64", Machine: elf.EM_PPC64, Data: elf.ELFDATA2MSB},
	{Name: "ppc-603e", Arch: "ppc", Triple: "powerpc-linux-gnu", Emulator: "ppc", CPU: "603e", Machine: elf.EM_PPC, Data: elf.ELFDATA2MSB, Lean: true},
	{Name: "ppc-mpc8349", Arch: "ppc", Triple: "powerpc-linux-gnu", Emulator: "ppc", CPU: "mpc8349", Machine: elf.EM_PPC, Data: elf.ELFDATA2MSB, Lean: true},
	{Name: "ppc-7448", Arch: "ppc", Triple: "powerpc-linux-gnu", Emulator: "ppc", CPU: "7448", Machine: elf.EM_PPC, Data: elf.ELFDATA2MSB, Lean: true, AgentOnly: true},
	{Name: "ppc-e500mc", Arch: "ppc", Triple: "powerpc-linux-gnu", Emulator: "ppc", CPU: "e500mc", Machine: elf.EM_PPC, Data: elf.ELFDATA2MSB, Lean: true, AgentOnly: true},
	{Name: "ppc64-e5500", Arch: "ppc64", Triple: "powerpc64-linux-gnu", Emulator: "ppc64", CPU: "e5500", Machine: elf.EM_PPC64, Data: elf.ELFDATA2MSB, Lean: true},
	{Name: "ppc64-e6500", Arch: "ppc64", Triple: "powerpc64-linux-gnu", Emulator: "ppc64", CPU: "e6500", Machine: elf.EM_PPC64, Data: elf.ELFDATA2MSB, Lean: true},
	// qemu-user 7.2 does not keep a store before a later load for this processor: no event index (docs/ports.md).
	{Name: "arm64", Arch: "arm64", Emulator: "aarch64", Machine: elf.EM_AARCH64, Data: elf.ELFDATA2LSB, Deny: "event_idx"},
	{Name: "ppc64le", Arch: "ppc64le", Emulator: "ppc64le", Machine: elf.EM_PPC64, Data: elf.ELFDATA2LSB, Lean: true},
	{Name: "riscv64", Arch: "riscv64", Emulator: "riscv64", Machine: elf.EM_RISCV, Data: elf.ELFDATA2LSB, Lean: true},
	{Name: "arm", Arch: "arm", Emulator: "arm", Machine: elf.EM_ARM, Data: elf.ELFDATA2LSB, Lean: true},
	{Name: "386", Arch: "386", Emulator: "i386", Native: "amd64", Machine: elf.EM_386, Data: elf.ELFDATA2LSB, Lean: true},
}

// ErrTool is what errors match (errors.Is) where a compiler or an emulator is not installed.
var ErrTool = errors.New("not installed")

func tool(what string, names ...string) (string, error) {
	for _, n := range names {
		if p, err := exec.LookPath(n); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s (%s): %w", what, strings.Join(names, " or "), ErrTool)
}

// GccgoVersions are the ends of the names of gccgo's programs, those that compile Go 1.18 and nothing newer
// first.
var GccgoVersions = []string{"-12", "-13", "-14", "-15", ""}

// Prefix returns the words that a program of the target has to be started with: the emulator, or none.
func (t Target) Prefix() ([]string, error) {
	if t.Arch == runtime.GOARCH || t.Native == runtime.GOARCH {
		return nil, nil
	}
	q, err := tool("the emulator", "qemu-"+t.Emulator+"-static", "qemu-"+t.Emulator)
	if err != nil {
		return nil, err
	}
	if t.CPU != "" {
		return []string{q, "-cpu", t.CPU}, nil
	}
	return []string{q}, nil
}

// Build builds the program of one end (a board.Side) in dir, from the module at root, and returns its path. It checks that
// the file is for the target's processor and byte order.
func (t Target) Build(root, dir string, side fmt.Stringer) (string, error) {
	pkg, name := "boardlink", "boardlink-"+t.Arch
	if t.Lean {
		pkg = "boardlink-" + side.String()
		name = pkg + "-" + t.Arch
	}
	if t.Triple != "" {
		name += "-gccgo"
	}
	out := filepath.Join(dir, name)
	if _, err := os.Stat(out); err == nil {
		return out, nil // another target's, with the same code
	}
	args := []string{"build", "-buildvcs=false", "-o", out}
	env := []string{"GOOS=linux", "GOARCH=" + t.Arch}
	if t.Triple == "" {
		env = append(env, "CGO_ENABLED=0")
	} else {
		for _, v := range GccgoVersions {
			gccgo, err := tool("the compiler", t.Triple+"-gccgo"+v)
			if err != nil {
				continue
			}
			cc, err := tool("the C compiler", t.Triple+"-gcc"+v)
			if err != nil {
				return "", err
			}
			env = append(env, "CGO_ENABLED=1", "GCCGO="+gccgo, "CC="+cc, "AR="+t.Triple+"-ar")
			break
		}
		if len(env) == 2 {
			return "", fmt.Errorf("the compiler (%s-gccgo; apt-get install gccgo-%s): %w", t.Triple, t.Triple, ErrTool)
		}
		args = append(args, "-compiler=gccgo", "-gccgoflags=-O2 -static", "-modfile="+filepath.Join("internal", "house", "testdata", "go118", "go.mod"))
	}
	cmd := exec.Command("go", append(args, "./cmd/"+pkg)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), env...)
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s for %s: %w\n%s", pkg, t.Name, err, b)
	}
	f, err := elf.Open(out)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if f.Machine != t.Machine || f.Data != t.Data {
		return "", fmt.Errorf("%s is for %v, %v; %v, %v was wanted", out, f.Machine, f.Data, t.Machine, t.Data)
	}
	return out, nil
}

// Command returns how an end (a board.Side) of the program at path is started, before its flags.
func (t Target) Command(path string, side fmt.Stringer) ([]string, error) {
	words, err := t.Prefix()
	if err != nil {
		return nil, err
	}
	words = append(words, path)
	if !t.Lean {
		words = append(words, side.String())
	}
	return words, nil
}

// BuildNative builds boardlink for this machine in dir, and returns its path.
func BuildNative(root, dir string) (string, error) {
	out := filepath.Join(dir, "boardlink")
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", out, "./cmd/boardlink")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build boardlink: %w\n%s", err, b)
	}
	return out, nil
}
