package pci_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
	"github.com/boardlink/boardlink/pci"
)

// serve starts an ivshmem server that ends with the test and returns its socket.
func serve(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ivshmem")
	s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 4 << 20, Vectors: 4})
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve()
	t.Cleanup(func() { s.Close() })
	return path
}

// find returns the address in the machine of the function with that vendor and device, "1af4:1110".
func find(t *testing.T, m *vm.VM, id string) string {
	t.Helper()
	for _, l := range strings.Split(vmtest.Get(t, m, "/proc/bus/pci/devices"), "\n") {
		f := strings.Fields(l)
		if len(f) > 1 && f[1] == strings.ReplaceAll(id, ":", "") {
			var n uint
			for _, c := range f[0] {
				n = n<<4 | uint(strings.IndexRune("0123456789abcdef", c))
			}
			return pci.Address{Bus: uint8(n >> 8), Device: uint8(n >> 3 & 31), Function: uint8(n & 7)}.String()
		}
	}
	t.Fatalf("machine %s has no function %s", m.Name, id)
	return ""
}

// TestInVM runs the tests of pci/vfio and pci/uio on the functions of virtual machines.
func TestInVM(t *testing.T) {
	vmtest.Short(t, "it boots virtual machines")
	const module = "github.com/boardlink/boardlink/pci/"
	env := func(t *testing.T, m *vm.VM, mode pci.Mode) []string {
		e := []string{"BOARDLINK_TEST_MODE=" + string(mode), "BOARDLINK_TEST_VFIO=" + find(t, m, "1af4:1110")}
		if m.Kernel.Spec.Arch == vm.AMD64 {
			e = append(e, "BOARDLINK_TEST_EDU="+find(t, m, "1234:11e8"))
		}
		return e
	}
	t.Run("iommu", func(t *testing.T) {
		m := vmtest.Boot(t, vm.Carrier(vm.Ivshmem{ID: "b0", Socket: serve(t), Port: "p0"}))
		vmtest.RunGoTest(t, m, module+"vfio", append(env(t, m, pci.VFIO), "BOARDLINK_TEST_RESET=1"), "-test.run="+*guestRun, "-test.timeout=60s")
	})
}
