package pci

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Holders names the processes that have the file open, "pid 17 (qemu)" each, as far as this process
// may know; "" for none. It is for error messages: it looks through all of /proc.
func Holders(file string) string {
	// Below /sys/bus are links; an open file is known by its own name.
	if real, err := filepath.EvalSymlinks(file); err == nil {
		file = real
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return ""
	}
	var l []string
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		dir := filepath.Join("/proc", p.Name(), "fd")
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if t, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && t == file {
				l = append(l, "pid "+p.Name()+" ("+readLine(filepath.Join("/proc", p.Name()), "comm")+")")
				break
			}
		}
	}
	return strings.Join(l, ", ")
}
