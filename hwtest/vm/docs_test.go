package vm_test

import (
	"context"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
)

// docsExample takes QEMU's options and the guest's commands out of docs/boards.md.
func docsExample(t *testing.T, socket string) (devices []string, writes [][2]string, board string, monitor []string) {
	t.Helper()
	b, err := os.ReadFile("../../docs/boards.md")
	if err != nil {
		t.Fatal(err)
	}
	iommu := false
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(b), -1) {
		text := strings.ReplaceAll(block[1], "\\\n", " ")
		for _, line := range strings.Split(text, "\n") {
			f := strings.Fields(line)
			for i := 0; i+1 < len(f) && f[0] == "qemu-system-x86_64"; i++ {
				switch {
				case f[i] == "-device" && strings.HasPrefix(f[i+1], "intel-iommu,"):
					iommu = f[i+1] == "intel-iommu,intremap=on,caching-mode=on" // as vm.Config.IOMMU has it
				case f[i] == "-device" || f[i] == "-chardev":
					devices = append(devices, f[i], strings.ReplaceAll(f[i+1], "/run/bl.sock", socket))
				}
			}
			if m := regexp.MustCompile(`^echo (.*) > (/sys/\S+)$`).FindStringSubmatch(line); m != nil {
				writes = append(writes, [2]string{m[2], m[1]})
			}
			if m := regexp.MustCompile(`^boardlink host --board ivshmem:(\S+)`).FindStringSubmatch(line); m != nil {
				board = m[1]
			}
		}
	}
	if m := regexp.MustCompile("(?s)```\n(device_del .*?)\n```").FindStringSubmatch(string(b)); m != nil {
		monitor = strings.Split(strings.ReplaceAll(m[1], "/run/bl.sock", socket), "\n")
	}
	if len(monitor) != 4 || monitor[0] != "device_del dev1" {
		t.Fatalf("docs/boards.md plugs in again by %q", monitor)
	}
	if !iommu || len(devices) != 6 || len(writes) != 1 || board == "" {
		t.Fatalf("docs/boards.md has IOMMU %v, devices %q, writes %q, board %q", iommu, devices, writes, board)
	}
	return devices, writes, board, monitor
}

// TestDocsExample: the machine and the binding of docs/boards.md are as it says, and the binding survives a re-plug.
func TestDocsExample(t *testing.T) {
	vmtest.Short(t, "the machine of docs/boards.md")
	s, err := loopback.NewServer(loopback.ServerConfig{Path: filepath.Join(t.TempDir(), "s"), Size: 16 << 20, Vectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve()
	t.Cleanup(func() { s.Close() })
	devices, writes, board, monitor := docsExample(t, s.Path())
	m := vmtest.Boot(t, vm.Config{Name: "docs", IOMMU: true, BootTimeout: 2 * time.Minute, Devices: devices, Modules: append(append([]string{}, vm.VFIOModules...), vm.NetModules...),
		Programs: map[string]string{"/bin/boardlink": "github.com/boardlink/boardlink/cmd/boardlink"}})
	if got := ivshmems(t, m); len(got) != 1 || got[board] != 16<<20 {
		t.Fatalf("ivshmem functions %v, want %s with 16 MiB", got, board)
	}
	for _, w := range writes {
		if err := m.Write(t.Context(), w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	driver := func() string {
		d, err := m.Readlink(t.Context(), "/sys/bus/pci/devices/"+board+"/driver")
		if err != nil {
			return ""
		}
		return path.Base(d)
	}
	eventually(t, "the function is bound", func() bool { return driver() == "vfio-pci" })
	out := vmtest.Run(t, m, "/bin/boardlink", "doctor", "ivshmem:"+board)
	if !strings.Contains(out, "8 ") || !strings.Contains(out, "vfio") {
		t.Errorf("doctor says\n%s", out)
	}
	t.Logf("%s", out)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := m.DeviceDel(ctx, "dev1"); err != nil { // the first line, and what it waits for
		t.Fatal(err)
	}
	eventually(t, "the board is gone", func() bool { return len(glob(t, m, "/sys/bus/pci/devices/"+board)) == 0 })
	if err := m.SettleIvshmem(ctx, 8); err != nil {
		t.Fatal(err)
	}
	for _, line := range monitor[1:] {
		out, err := m.QMP(ctx, "human-monitor-command", map[string]any{"command-line": line})
		if err != nil || strings.Contains(string(out), "Error") {
			t.Fatalf("%s: %s, %v", line, out, err)
		}
	}
	eventually(t, "the function is bound after a re-plug", func() bool { return driver() == "vfio-pci" })
}
