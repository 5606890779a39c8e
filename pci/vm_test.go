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

// pseries is a POWER machine whose board, with an edu function, has a host bridge of its own: all functions behind one bridge share an IOMMU
// group, and the first one has the functions that the machine itself needs.
func pseries(socket string) vm.Config {
	c := vm.Pseries()
	c.Devices = append(c.Devices, "-device", "spapr-pci-host-bridge,index=1,id=phb1",
		"-chardev", "socket,id=b0,path="+socket, "-device", "ivshmem-doorbell,vectors=4,chardev=b0,bus=phb1.0,addr=0",
		"-device", "edu,bus=phb1.0,addr=1", "-device", "edu,bus=pci.0,addr=0x1f")
	return c
}

// TestInVM runs the tests of pci/vfio and pci/uio on the functions of virtual machines.
func TestInVM(t *testing.T) {
	vmtest.Short(t, "it boots virtual machines")
	const module = "github.com/boardlink/boardlink/pci/"
	env := func(t *testing.T, m *vm.VM, mode pci.Mode) []string {
		e := []string{"BOARDLINK_TEST_MODE=" + string(mode)}
		if m.Kernel.Spec.Arch == vm.AMD64 {
			e = append(e, "BOARDLINK_TEST_VFIO="+find(t, m, "1af4:1110"), "BOARDLINK_TEST_EDU="+find(t, m, "1234:11e8"))
		}
		return e
	}
	for _, c := range []struct {
		name  string
		cfg   vm.Config
		modes []pci.Mode
		env   string
	}{
		// Behind a port of its own a function can be reset alone.
		{"iommu", vm.Carrier(vm.Ivshmem{ID: "b0", Socket: serve(t), Port: "p0"}), []pci.Mode{pci.VFIO}, "BOARDLINK_TEST_RESET=1"},
		{"plain", vm.Plain(vm.Ivshmem{ID: "b0", Socket: serve(t)}), []pci.Mode{pci.UIO, pci.SysfsOnly}, ""},
		{"noiommu", vm.NoIOMMU(vm.Ivshmem{ID: "b0", Socket: serve(t)}), []pci.Mode{pci.VFIONoIOMMU}, ""},
		{"pseries", pseries(serve(t)), []pci.Mode{pci.VFIO, pci.UIO}, "BOARDLINK_TEST_VFIO=0001:00:00.0 BOARDLINK_TEST_EDU=0001:00:01.0 BOARDLINK_TEST_SHARED=0000:00:1f.0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := vmtest.Boot(t, c.cfg)
			for _, mode := range c.modes {
				pkg := module + "vfio"
				if mode == pci.UIO || mode == pci.SysfsOnly {
					pkg = module + "uio"
				}
				t.Run(string(mode), func(t *testing.T) {
					vmtest.RunGoTest(t, m, pkg, append(env(t, m, mode), strings.Fields(c.env)...), "-test.run="+*guestRun, "-test.timeout=100s")
				})
			}
		})
	}
}
