package vm_test

import (
	"path/filepath"
	"testing"

	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
)

// serve starts an ivshmem server that ends with the test and returns its socket.
func serve(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ivshmem")
	s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: size, Vectors: 4})
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve()
	t.Cleanup(func() { s.Close() })
	return path
}

func TestCarrier(t *testing.T) {
	m := vmtest.Boot(t, vm.Carrier(vm.Ivshmem{ID: "b0", Socket: serve(t, 4<<20), Addr: "0x4"},
		vm.Ivshmem{ID: "b1", Socket: serve(t, 16<<20), Port: "p0"}, vm.Ivshmem{ID: "b2", Port: "p1", Empty: true}))
	t.Logf("%s: %v", m.Kernel.Release, m.BootTime)
	s, err := m.Monitor(t.Context(), "info pci")
	t.Log(s, err)
	for _, l := range m.KernelLog() {
		t.Log(l)
	}
	t.Log(vmtest.Get(t, m, "/proc/modules"))
}
func TestPseries(t *testing.T) {
	m := vmtest.Boot(t, vm.Pseries(vm.Ivshmem{ID: "b0", Socket: serve(t, 4<<20), Addr: "0x4"}))
	t.Logf("%s: %v", m.Kernel.Release, m.BootTime)
	s, err := m.Monitor(t.Context(), "info pci")
	t.Log(s, err)
	for _, l := range m.KernelLog() {
		t.Log(l)
	}
	t.Log(vmtest.Get(t, m, "/proc/modules"))
}
