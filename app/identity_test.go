package app

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board"
)

// fakeMachine is a root directory with these files.
func fakeMachine(t *testing.T, files map[string]string) sources {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return sources{root: root, state: []string{"/var/lib/boardlink"}, random: random}
}

const (
	idA = "3d1219c7c4c5404aaa1f6d2a48adfda4\n"
	idB = "00112233445566778899aabbccddeeff\n"
)

func identify(t *testing.T, s sources, stated string) Machine {
	t.Helper()
	m, err := s.identify(stated)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestIdentitySources: which file counts, and which text does not.
func TestIdentitySources(t *testing.T) {
	const dmi, dt = "/sys/class/dmi/id/product_uuid", "/sys/firmware/devicetree/base/serial-number"
	const kept = "/var/lib/boardlink/machine-id"
	for _, c := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"machine-id", map[string]string{"/etc/machine-id": idA, dmi: "4c4c4544-0042-3510-8054-b4c04f564433\n"}, "/etc/machine-id"},
		{"empty, as in a container", map[string]string{"/etc/machine-id": "", dmi: "4C4C4544-0042-3510-8054-B4C04F564433\n"}, dmi},
		{"an image that was never started", map[string]string{"/etc/machine-id": "uninitialized\n", dt: "0000012345abcdef\x00"}, dt},
		{"zeros", map[string]string{"/etc/machine-id": strings.Repeat("0", 32), dt: "AB12\x00"}, dt},
		{"a UUID of a careless vendor", map[string]string{dmi: "03000200-0400-0500-0006-000700080009\n", dt: "AB12\x00"}, dt},
		{"a UUID of ones", map[string]string{dmi: "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF\n"}, kept},
		{"a serial number of hyphens", map[string]string{dmi: "----\n"}, kept},
		{"a serial number that is text", map[string]string{dmi: "To be filled by O.E.M.\n"}, kept},
		{"nothing", nil, kept},
		{"kept", map[string]string{kept: idB}, kept},
		{"kept, and lost its text", map[string]string{kept: ""}, kept},
	} {
		s := fakeMachine(t, c.files)
		m := identify(t, s, "")
		if m.From != c.want || m.Warning != "" {
			t.Errorf("%s: from %s, %q; want %s", c.name, m.From, m.Warning, c.want)
		}
		if again := identify(t, s, ""); again != m {
			t.Errorf("%s: %v at the next start, %v before", c.name, again, m)
		}
		left, _ := filepath.Glob(filepath.Join(s.root, filepath.Dir(kept), "*-*-*"))
		if len(left) != 0 {
			t.Errorf("%s: left behind: %v", c.name, left)
		}
	}
}

// TestIdentityOfNoMachine: where nothing can be kept it lasts as long as the program, and a line says so.
func TestIdentityOfNoMachine(t *testing.T) {
	s := fakeMachine(t, map[string]string{"/var/lib": "a file in the way"})
	a, b := identify(t, s, ""), identify(t, s, "")
	if a == b || !strings.Contains(a.Warning, "--machine-id") || !strings.Contains(a.Warning, "/var/lib") {
		t.Errorf("%+v, %+v", a, b)
	}
	if m := identify(t, s, " rack 4, carrier 2\n"); m.Warning != "" || m != identify(t, s, "rack 4, carrier 2") {
		t.Errorf("%+v", m)
	}
	if _, err := s.identify(strings.Repeat("x", 257)); !errors.As(err, new(UsageError)) {
		t.Errorf("an identity of 257 bytes: %v", err)
	}
	s.state = nil
	s.random = func([]byte) error { return os.ErrDeadlineExceeded }
	if _, err := s.identify(""); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("without random numbers: %v", err)
	}
}

// TestIdentityRace: programs that start at the same time on a machine without an identity agree.
func TestIdentityRace(t *testing.T) {
	s := fakeMachine(t, nil)
	const n = 8
	got := make(chan Machine, n)
	for i := 0; i < n; i++ {
		go func() {
			m, err := s.identify("")
			if err != nil {
				t.Error(err)
			}
			got <- m
		}()
	}
	first := <-got
	for i := 1; i < n; i++ {
		if m := <-got; m != first {
			t.Errorf("%v and %v", m, first)
		}
	}
}

// TestMAC: another address for another machine, board, link, side and device; the same for the same.
func TestMAC(t *testing.T) {
	a := identify(t, fakeMachine(t, map[string]string{"/etc/machine-id": idA}), "")
	b := identify(t, fakeMachine(t, map[string]string{"/etc/machine-id": idB}), "")
	mac := func(m Machine) string { return m.MAC("board0", board.Host, "ivshmem:0000:01:00.0", 0).String() }
	if got, want := mac(a), mac(identify(t, fakeMachine(t, map[string]string{"/etc/machine-id": idA}), "")); got != want {
		t.Errorf("%s, and %s at the next start", got, want)
	}
	// A contract: a release that changes it changes the addresses of everybody's interfaces.
	if got, want := mac(a), "5e:bb:a4:a5:15:ab"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	seen := map[string]string{}
	for name, m := range map[string]string{
		"this":           mac(a),
		"other machine":  mac(b),
		"other link":     a.MAC("board1", board.Host, "ivshmem:0000:01:00.0", 0).String(),
		"other side":     a.MAC("board0", board.Agent, "ivshmem:0000:01:00.0", 0).String(),
		"other slot":     a.MAC("board0", board.Host, "ivshmem:0000:02:00.0", 0).String(),
		"other device":   a.MAC("board0", board.Host, "ivshmem:0000:01:00.0", 1).String(),
		"other kind":     a.MAC("board0", board.Host, "loopback:/run/a.sock", 0).String(),
		"other loopback": a.MAC("board0", board.Host, "loopback:/run/b.sock", 0).String(),
	} {
		if o, ok := seen[m]; ok {
			t.Errorf("%s and %s: both %s", name, o, m)
		}
		seen[m] = name
	}
	if got := a.MAC("board0", board.Host, "generic:x1.toml@01:00.0,mode=uio", 0).String(); got != mac(a) {
		t.Errorf("how the slot is opened changes the address: %s, %s", got, mac(a))
	}
}

func TestSlot(t *testing.T) {
	for spec, want := range map[string]string{
		"ivshmem:0000:00:04.0":                                "pci 0000:00:04.0",
		"ivshmem:00:04.0,mode=sysfs,interrupts=off":           "pci 0000:00:04.0",
		"mpc83xx:0001:01:00.0,engine=2+3":                     "pci 0001:01:00.0",
		"generic:/etc/a@b/x.toml@0000:01:00.0":                "pci 0000:01:00.0",
		"generic:x.toml":                                      "generic:x.toml",
		"loopback:/run/../run/a.sock":                         "loopback /run/a.sock",
		"loopback:fd=7":                                       "loopback",
		"mpc83xx:immr=0xe0000000,window=0x0f000000+0x1000000": "mpc83xx:immr=0xe0000000,window=0x0f000000+0x1000000",
		"vhost-user:/run/../run/a.sock,client":                "vhost-user /run/a.sock",
		"vhost-user:fd=3,queues=2":                            "vhost-user",
		"nonsense":                                            "nonsense",
	} {
		if got := Slot(spec); got != want {
			t.Errorf("%s: %q, want %q", spec, got, want)
		}
	}
}
