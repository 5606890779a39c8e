package ports

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
)

// exit386 is a program for 80386 that ends with status 0: an ELF header, a program header, and
// "mov $1,%eax; xor %ebx,%ebx; int $0x80" (elf(5), System V ABI, Intel386 supplement).
var exit386 = []byte{
	0x7f, 'E', 'L', 'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0,
	2, 0, 3, 0, 1, 0, 0, 0, 0x54, 0x80, 0x04, 0x08, 52, 0, 0, 0,
	0, 0, 0, 0, 0, 0, 0, 0, 52, 0, 32, 0, 1, 0, 0, 0, 0, 0, 0, 0,
	1, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x04, 0x08, 0, 0x80, 0x04, 0x08,
	0x5d, 0, 0, 0, 0x5d, 0, 0, 0, 5, 0, 0, 0, 0, 0x10, 0, 0,
	0xb8, 1, 0, 0, 0, 0x31, 0xdb, 0xcd, 0x80,
}

var runs386 struct {
	sync.Once
	yes bool
}

// No386 says why 386 is left out where Runs386 is false. Nothing can be installed against it: programs of Go's 386 port
// crash at their start under qemu-user 7.2.
const No386 = "this kernel runs no programs for 80386 (CONFIG_IA32_EMULATION); arm and 32-bit PowerPC are the 32-bit machines here"

// Runs386 tells whether this machine runs programs for 80386: its kernel may not.
func Runs386() bool {
	runs386.Do(func() {
		if runtime.GOARCH != "amd64" {
			return
		}
		dir, err := os.MkdirTemp("", "boardlink-386-")
		if err != nil {
			return
		}
		defer os.RemoveAll(dir)
		path := filepath.Join(dir, "exit")
		if os.WriteFile(path, exit386, 0o700) == nil {
			runs386.yes = exec.Command(path).Run() == nil
		}
	})
	return runs386.yes
}
