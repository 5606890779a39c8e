package scan_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	upci "github.com/u-root/u-root/pkg/pci"

	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/pci/scan"
)

// put writes a function into a sysfs of our own.
func put(t *testing.T, root, addr string, files map[string]string) {
	t.Helper()
	d := filepath.Join(root, "bus/pci/devices", addr)
	if err := os.MkdirAll(d, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, v := range files {
		if err := os.WriteFile(filepath.Join(d, name), []byte(v), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAll(t *testing.T) {
	root := t.TempDir()
	put(t, root, "0000:00:04.0", map[string]string{
		"vendor": "0x1af4\n", "device": "0x1110\n", "class": "0x050000\n", "irq": "11\n",
		"resource": "0x00000000febd1000 0x00000000febd10ff 0x0000000000040200\n",
	})
	// On 32-bit machines u-root's reader gives up such a BAR, and with it the whole bus.
	put(t, root, "0000:01:00.0", map[string]string{
		"vendor": "0x1af4\n", "device": "0x1041\n", "class": "0x020000\n", "irq": "0\n",
		"resource": "0x0000004000000000 0x0000007fffffffff 0x000000000014220c\n",
	})
	// And it panics on a configuration space that is cut short.
	put(t, root, "0000:02:00.0", map[string]string{
		"vendor": "0xf00d\n", "device": "0x0001\n", "class": "0x131234\n", "irq": "0\n", "config": "\x01", "resource": "",
	})
	put(t, root, "0000:03:00.0", map[string]string{
		"vendor": "0x8086\n", "device": "0x0001\n", "class": "0x088099\n", "irq": "0\n", "resource": "nonsense\n",
	})
	fs, err := scan.All(pci.Sysfs{Root: root})
	if err == nil || !strings.Contains(err.Error(), "0000:03:00.0") {
		t.Errorf("the function without sense is not named: %v", err)
	}
	if len(fs) != 3 {
		t.Fatalf("%d functions, want 3: %v", len(fs), fs)
	}
	for i, want := range []string{
		"0000:00:04.0 Memory RAM: Red Hat, Inc. QEMU Inter-VM shared memory device",
		"0000:01:00.0 Network Ethernet: Red Hat, Inc. Virtio 1.0 network device",
		"0000:02:00.0 class 131234: f00d 0001",
	} {
		if got := fs[i].String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if b := fs[1].BARs; len(b) != 1 || b[0].Start != 1<<38 || b[0].Size != 1<<38 {
		t.Errorf("BARs above 4 GiB: %v", b)
	}
	a, _ := pci.ParseAddress("0000:09:00.0")
	if _, err := scan.One(pci.Sysfs{Root: root}, a); !errors.Is(err, pci.ErrAbsent) {
		t.Errorf("an absent function: %v", err)
	}
}

// TestClassNames: no two words of a class name run together, whatever the class.
func TestClassNames(t *testing.T) {
	root := t.TempDir()
	for class, want := range map[string]string{
		"0x050000": "Memory RAM", "0x080400": "System PCI Hotplug", "0x030200": "Display 3D", "0x0b0000": "Processor 386",
		"0x060400": "Bridge PCI", "0x060a00": "Bridge IB To PCI", "0x040300": "Multimedia Audio Dev", "0x010802": "Storage NVMHCI",
		"0x088099": "System Other", "0x131234": "class 131234",
	} {
		put(t, root, "0000:00:04.0", map[string]string{"vendor": "0x1af4\n", "device": "0x1110\n", "class": class + "\n", "irq": "0\n", "resource": ""})
		a, _ := pci.ParseAddress("0000:00:04.0")
		f, err := scan.One(pci.Sysfs{Root: root}, a)
		if err != nil || f.ClassName != want {
			t.Errorf("class %s is called %q, want %q; %v", class, f.ClassName, want, err)
		}
	}
	for class, name := range upci.ClassNames {
		root := t.TempDir()
		if class < 1<<8 {
			class <<= 16
		}
		put(t, root, "0000:00:04.0", map[string]string{"vendor": "0x1af4\n", "device": "0x1110\n", "class": fmt.Sprintf("%#06x\n", class), "irq": "0\n", "resource": ""})
		a, _ := pci.ParseAddress("0000:00:04.0")
		f, err := scan.One(pci.Sysfs{Root: root}, a)
		if err != nil || regexp.MustCompile(`[a-z][A-Z0-9]`).MatchString(f.ClassName) {
			t.Errorf("class %06x, %s, is called %q; %v", class, name, f.ClassName, err)
		}
	}
}

// TestThisMachine: whatever there is can be read.
func TestThisMachine(t *testing.T) {
	fs, err := scan.All(pci.Sysfs{})
	if err != nil {
		t.Error(err)
	}
	for _, f := range fs {
		t.Log(f)
	}
}
