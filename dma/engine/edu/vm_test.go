package edu_test

import (
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
)

// TestInVM runs the tests of hw_test.go on QEMU's device behind an emulated IOMMU.
func TestInVM(t *testing.T) {
	vmtest.Short(t, "it boots a virtual machine")
	c := vm.Carrier()
	c.Devices = []string{"-device", "edu,addr=0x7"}
	m := vmtest.Boot(t, c)
	vmtest.RunGoTest(t, m, "github.com/boardlink/boardlink/dma/engine/edu", []string{"BOARDLINK_TEST_EDU=0000:00:07.0"}, "-test.run=^TestHardware")
	// The IOMMU's report comes by an interrupt and a printk.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		for _, l := range m.KernelLog() {
			if strings.Contains(l.Text, "DMAR") && strings.Contains(l.Text, "DMA Write") && strings.Contains(l.Text, "0x9000000") {
				t.Logf("the IOMMU's report: %s", l.Text)
				return
			}
		}
		if time.Now().After(end) {
			t.Fatal("no report of the IOMMU about address 0x9000000")
		}
	}
}
