package generic

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/mmio/mmiotest"
	"github.com/boardlink/boardlink/pci"
)

// decode reads a description by another decoder, as an oracle.
func decode(data []byte, c *Config) error {
	md, err := toml.Decode(string(data), c)
	if err == nil && len(md.Undecoded()) > 0 {
		err = fmt.Errorf("%s: there is no such key", md.Undecoded()[0])
	}
	return err
}

// example is the file of docs/boards.md.
func example(t testing.TB) string {
	t.Helper()
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "boards.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(doc), "```toml\n")
	text, _, ok2 := strings.Cut(rest, "```")
	if !ok || !ok2 {
		t.Fatal("docs/boards.md has no example")
	}
	return text
}

// TestExample: the documented file is valid, and has every key there is.
func TestExample(t *testing.T) {
	text := example(t)
	c, problems := Check([]byte(text))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	var other Config
	if err := decode([]byte(text), &other); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&other, c); d != "" {
		t.Fatalf("another decoder reads something else: %s", d)
	}
	doc := "\n" + text
	for _, k := range []string{"name", "vendor", "device", "bar", "path", "map", "offset", "size", "bus_address", "memory", "min_access", "max_access",
		"width", "big_endian", "vectors", "write", "value", "stride", "kind", "mask", "clear", "clear_offset", "bits", "masks_when_set", "bus_offset", "highest_address",
		"to_host", "to_board", "window_address"} {
		if !strings.Contains(doc, "\n"+k+" = ") && !strings.Contains(doc, "\n# "+k+" = ") {
			t.Errorf("docs/boards.md has no %s", k)
		}
	}
}

// TestValidate: each change of the example breaks it, and the error names the key.
func TestValidate(t *testing.T) {
	for _, tc := range []struct {
		key    string
		change func(*Config)
	}{
		{"host", func(c *Config) { c.Host, c.Agent = nil, nil }},
		{"host.window.bar", func(c *Config) { c.Host.Window.BAR = 6 }},
		{"host.engine.kind", func(c *Config) { c.Host.Engine.Kind = "fast" }},
		{"host.engine.bar", func(c *Config) { c.Host.Engine.BAR = 6 }},
		{"host.engine.offset", func(c *Config) { c.Host.Engine.Offset = 4 }},
		{"host.engine.to_host", func(c *Config) { c.Host.Engine.ToHost, c.Host.Engine.ToBoard = nil, nil }},
		{"host.engine.to_host", func(c *Config) { c.Host.Engine.ToHost = []int{4} }},
		{"host.engine.to_board", func(c *Config) { c.Host.Engine.ToBoard = []int{1, 1} }},
		{"host.engine.window_address", func(c *Config) { c.Host.Engine.WindowAddress = 8 }},
		{"host.engine.window_address", func(c *Config) { c.Host.Engine.WindowAddress, c.Host.Window.BusAddress = 0, 0 }},
		{"host.engine.bus_offset", func(c *Config) { c.Host.Engine.BusOffset = 1 }},
		{"host.engine.descriptors", func(c *Config) { c.Host.Engine.Kind = "dw-edma" }},
		{"host.engine.descriptors", func(c *Config) { c.Host.Engine.Descriptors = &Descriptors{BusAddress: 8, Size: 4096} }},
		{"host.engine.descriptors", func(c *Config) { c.Host.Engine.Descriptors = &Descriptors{} }},
		{"host.engine.descriptors.path", func(c *Config) { c.Host.Engine.Descriptors = &Descriptors{Place: Place{Path: "x"}, Size: 4096} }},
		{"host.window.path", func(c *Config) { c.Host.Window.Path = "/dev/mem" }},
		{"host.window.offset", func(c *Config) { c.Host.Window.Offset = 4 }},
		{"host.window.size", func(c *Config) { c.Host.Window.Size = 0x1000 }},
		{"host.window.size", func(c *Config) { c.Host.Window.Size = 0x10000 }},
		{"host.window.memory", func(c *Config) { c.Host.Window.Memory = "cached" }},
		{"host.window.memory", func(c *Config) { c.Host.Window.Memory = "fast" }},
		{"host.window.min_access", func(c *Config) { c.Host.Window.MinAccess = 64; c.Host.Window.MaxAccess = 64 }},
		{"host.window.min_access", func(c *Config) { c.Host.Window.MinAccess = 32; c.Host.Window.MaxAccess = 16 }},
		{"host.window.min_access", func(c *Config) { c.Host.Window.MaxAccess = 24 }},
		{"host.window.max_access", func(c *Config) { c.Host.Window.MaxAccess = 8 }},
		{"host.window.bus_address", func(c *Config) { c.Host.Window.BusAddress = 0x1000 }},
		{"host.window.bus_address", func(c *Config) { c.Host.Window.BusAddress = 0xfffffffffffff000 }},
		{"agent.window.size", func(c *Config) { c.Agent.Window.Size = 0 }},
		{"agent.window.bar", func(c *Config) { c.Agent.Window.BAR = 1 }},
		{"agent.window.map", func(c *Config) { c.Agent.Window.Map = -1 }},
		{"agent.window.offset", func(c *Config) { c.Agent.Window.Offset = 1 << 63 }},
		{"host.ring.width", func(c *Config) { c.Host.Ring.Width = 64 }},
		{"host.ring.offset", func(c *Config) { c.Host.Ring.Offset = 2 }},
		{"host.ring.stride", func(c *Config) { c.Host.Ring.Stride = 2 }},
		{"host.ring.vectors", func(c *Config) { c.Host.Ring.Vectors = 65 }},
		{"host.ring.vectors", func(c *Config) { c.Host.Ring.Vectors = 33; c.Host.Ring.Write = "bit" }},
		{"host.ring.vectors", func(c *Config) { c.Host.Ring.Vectors = 1 }},
		{"host.ring.value", func(c *Config) { c.Host.Ring.Width = 8; c.Host.Ring.Write = "number"; c.Host.Ring.Value = 0x100 }},
		{"host.ring.value", func(c *Config) { c.Host.Ring.Width = 8; c.Host.Ring.Write = ""; c.Host.Ring.Value = 0x100 }},
		{"host.ring.write", func(c *Config) { c.Host.Ring.Write = "value" }},
		{"host.ring.write", func(c *Config) { c.Host.Ring.Write = "shout" }},
		{"host.interrupt.kind", func(c *Config) { c.Host.Interrupt.Kind = "nmi" }},
		{"host.interrupt.path", func(c *Config) { c.Host.Interrupt.Path = "/dev/uio0" }},
		{"host.interrupt.cause", func(c *Config) { c.Host.Interrupt.Cause = nil }},
		{"host.interrupt.vectors", func(c *Config) { c.Host.Interrupt.Vectors = 40 }},
		{"host.interrupt.cause.mask", func(c *Config) { c.Host.Interrupt.Cause.Mask = 0 }},
		{"host.interrupt.cause.mask", func(c *Config) { c.Host.Interrupt.Cause.Mask = 5 }},
		{"host.interrupt.cause.mask", func(c *Config) { c.Host.Interrupt.Cause.Mask = 0xff0; c.Host.Interrupt.Cause.Width = 8 }},
		{"host.interrupt.cause.clear", func(c *Config) { c.Host.Interrupt.Cause.Clear = "hope" }},
		{"host.interrupt.cause.clear_offset", func(c *Config) { c.Host.Interrupt.Cause.ClearOffset = 1 }},
		{"host.interrupt.cause.enable.bits", func(c *Config) { c.Host.Interrupt.Cause.Enable.Bits = 0 }},
		{"agent.interrupt.path", func(c *Config) { c.Agent.Interrupt.Path = "" }},
		{"agent.interrupt.kind", func(c *Config) { c.Agent.Interrupt.Kind = "msi" }},
		{"agent.interrupt.vectors", func(c *Config) { c.Agent.Interrupt.Cause = nil; c.Agent.Interrupt.Vectors = 2 }},
		{"host.pool.size", func(c *Config) { c.Host.Pool.Size = 0x1000 }},
		{"host.pool.bus_address", func(c *Config) { c.Host.Pool.BusAddress = 0x1000 }},
		{"host.pool.bus_offset", func(c *Config) { c.Host.Pool.BusOffset = 1 }},
		{"agent.pool.size", func(c *Config) { c.Agent.Pool.Size = c.Host.Pool.Size / 2 }},
		{"agent.pool.bus_address", func(c *Config) { c.Agent.Pool.BusAddress = 0xfffffffffffff000 }},
		{"agent.pool.bus_offset", func(c *Config) { c.Agent.Pool.HighestAddress = 1 }},
	} {
		var c Config
		if err := decode([]byte(example(t)), &c); err != nil {
			t.Fatal(err)
		}
		tc.change(&c)
		err := c.Validate()
		var e *ConfigError
		if !errors.As(err, &e) || e.Key != tc.key {
			t.Errorf("%s: %v", tc.key, err)
		}
	}
}

// TestOpen: files and arguments that are at fault say so, as the operator's.
func TestOpen(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := file("good.toml", example(t))
	hostOnly := file("host.toml", "[host.window]\nbar=2\n")
	for _, tc := range []struct {
		arg  string
		side board.Side
		want string
	}{
		{"", board.Host, "file"},
		{filepath.Join(dir, "none"), board.Host, "no such file"},
		{dir + "@0000:00:04.0", board.Host, ""},
		{file("bad.toml", "x") + "@0000:00:04.0", board.Host, "bad.toml"},
		{file("key.toml", "[host.window]\nbar=2\nspeed=9\n") + "@0000:00:04.0", board.Host, "host.window.speed"},
		{file("big.toml", strings.Repeat("#\n", maxFile)), board.Host, "not a description"},
		{good, board.Host, "PCI address"},
		{good + "@zero", board.Host, "PCI address"},
		{good + "@0000:00:04.0,mode=x", board.Host, "mode"},
		{good + "@0000:00:04.0", board.Agent, "the agent opens the file alone"},
		{hostOnly, board.Agent, "no [agent]"},
		{file("agent.toml", "[agent.window]\nsize=0x10000\n") + "@0000:00:04.0", board.Host, "no [host]"},
	} {
		_, err := board.Open("generic:"+tc.arg, board.Options{Side: tc.side})
		if !errors.Is(err, board.ErrInput) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q: %v", tc.arg, err)
		}
	}
	if _, err := board.Open("generic:"+good+"@0000:ff:1f.7,mode=vfio", board.Options{}); !errors.Is(err, board.ErrAbsent) {
		t.Errorf("a function that is not there: %v", err)
	}
}

// TestAgentFiles: the agent's end over a file that stands for the board's memory, opened twice.
func TestAgentFiles(t *testing.T) {
	dir := t.TempDir()
	mem, toml := filepath.Join(dir, "mem"), filepath.Join(dir, "b.toml")
	if err := os.WriteFile(mem, make([]byte, 0x40000), 0o600); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf(`
[agent.window]
path = %q
offset = 0x10000
size = 0x20000
bus_address = 0x8000_0000
[agent.ring]
path = %q
offset = 0x3004
write = "bit"
vectors = 4
`, mem, mem)
	if err := os.WriteFile(toml, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	o := board.Options{Side: board.Agent}
	b, err := board.Open("generic:"+toml, o)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	w := b.Window()
	if w.Addr != 0x8000_0000 || w.Mem.Size() != 0x20000 || w.Mem.Kind() != mmio.Uncached || w.Across {
		t.Errorf("window: %+v", w)
	}
	w.Mem.Store32(8, 0x01020304)
	r, err := b.Ringer(board.RingInfo{Method: board.RingBoard, Vectors: 4}, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Ring(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(mem)
	if err != nil {
		t.Fatal(err)
	}
	if string(got[0x10008:0x1000c]) != "\x04\x03\x02\x01" || string(got[0x3004:0x3008]) != "\x04\x00\x00\x00" {
		t.Errorf("memory % x, doorbell % x", got[0x10008:0x1000c], got[0x3004:0x3008])
	}
	if _, err := board.Open("generic:"+toml, o); !errors.Is(err, board.ErrSideTaken) {
		t.Errorf("a second agent: %v", err)
	}
	for _, bad := range []struct {
		info board.RingInfo
		v    uint32
	}{{board.RingInfo{Method: board.RingIvshmem, Vectors: 1}, 0}, {board.RingInfo{Method: board.RingBoard, Vectors: 5}, 0}, {board.RingInfo{Method: board.RingBoard, Vectors: 3}, 3}} {
		if _, err := b.Ringer(bad.info, bad.v); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
	b.Close()
	b, err = board.Open("generic:"+toml, o)
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
}

// only passes accesses of some widths on to a Strict.
type only struct {
	*mmiotest.Strict
	t        testing.TB
	min, max uint
}

func (o *only) check(width uint) {
	if width < o.min || width > o.max {
		o.t.Helper()
		o.t.Errorf("an access of %d bytes; %d to %d are allowed", width, o.min, o.max)
	}
}

func (o *only) Load(off uint64, width uint) uint64 {
	o.check(width)
	return o.Strict.Load(off, width)
}

func (o *only) Store(off uint64, width uint, v uint64) {
	o.check(width)
	o.Strict.Store(off, width, v)
}

// TestNarrow: every access and copy gives what it does on plain memory, by allowed widths only.
func TestNarrow(t *testing.T) {
	for _, w := range [][2]uint{{8, 64}, {8, 16}, {16, 16}, {32, 32}, {16, 32}, {32, 64}, {8, 32}} {
		s := mmiotest.New(256)
		init := make([]byte, 256)
		for i := range init {
			init[i] = byte(i * 7)
		}
		s.Poke(0, init)
		want := append([]byte(nil), init...)
		m := limit(mmio.NewBusMem(&only{s, t, w[0] / 8, w[1] / 8}, 256, mmio.Uncached), w[0], w[1])
		m.Store8(3, 0xaa)
		want[3] = 0xaa
		m.Store16(6, 0xbbcc)
		want[6], want[7] = 0xcc, 0xbb
		m.Store32(12, 0x01020304)
		copy(want[12:], "\x04\x03\x02\x01")
		m.Store64(24, 0x1122334455667788)
		copy(want[24:], "\x88\x77\x66\x55\x44\x33\x22\x11")
		m.CopyIn(41, []byte("thirteen char"))
		copy(want[41:], "thirteen char")
		got := make([]byte, 256)
		s.Peek(0, got)
		if string(got) != string(want) {
			t.Errorf("%v: memory differs: % x, want % x", w, got[:64], want[:64])
		}
		if a, b, c, d := m.Load8(3), m.Load16(6), m.Load32(12), m.Load64(24); a != 0xaa || b != 0xbbcc || c != 0x01020304 || d != 0x1122334455667788 {
			t.Errorf("%v: loads %#x %#x %#x %#x", w, a, b, c, d)
		}
		out := make([]byte, 13)
		m.CopyOut(out, 41)
		if string(out) != "thirteen char" {
			t.Errorf("%v: %q", w, out)
		}
		if err := s.Err(); err != nil {
			t.Errorf("%v: %v", w, err)
		}
	}
}

// moving changes a 32-bit word after each load of a half.
type moving struct {
	*mmiotest.Strict
	v     uint32
	moves int
}

func (m *moving) Load(off uint64, width uint) uint64 {
	r := uint64(m.v >> (8 * off) & 0xffff)
	if m.moves > 0 {
		m.moves--
		m.v += 0x10000 - 1
		if m.v&0xffff == 0 {
			m.v--
		}
	}
	return r
}

// TestNarrowSteady: a word that is written at once while its halves are read is never seen torn.
func TestNarrowSteady(t *testing.T) {
	for moves := 0; moves <= 5; moves++ {
		m := &moving{mmiotest.New(8), 0x0001_ffff, moves}
		seen := map[uint32]bool{m.v: true}
		probe := &moving{nil, m.v, moves}
		for i := 0; i < moves; i++ {
			probe.Load(0, 2)
			seen[probe.v] = true
		}
		mem := limit(mmio.NewBusMem(m, 8, mmio.Uncached), 16, 16)
		if v := mem.Load32(0); !seen[v] {
			t.Errorf("%d moves: %#x was never there", moves, v)
		}
	}
}

// FuzzConfig: whatever a file says, reading it ends in an error or in a Config whose doorbells and
// registers can be computed.
func FuzzConfig(f *testing.F) {
	f.Add([]byte(example(f)))
	f.Add([]byte("[agent.window]\nsize=0x10000\n[agent.interrupt]\npath='/dev/uio0'\n"))
	f.Add([]byte("[host.window]\nbar=2\noffset=0xfffffffffffffff8\n"))
	f.Add([]byte("[host.window]\n[host.ring]\nwrite='bit'\nvalue=31\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		cp, problems := Check(data)
		if len(problems) > 0 {
			for _, p := range problems {
				if p.Reason == "" || p.Line < 0 || p.Line > bytes.Count(data, []byte("\n"))+1 || strings.Contains(p.String(), "\n") || !utf8.ValidString(p.String()) {
					t.Fatalf("%+v", p)
				}
			}
			return
		}
		c := *cp
		var other Config
		if err := decode(data, &other); err != nil && !strings.Contains(err.Error(), "out of range") {
			t.Fatalf("another decoder refuses what this one takes: %v", err)
		} else if d := cmp.Diff(other, c); err == nil && d != "" {
			t.Fatalf("another decoder reads something else: %s", d)
		}
		if h := c.Host; h != nil && h.Ring != nil {
			for v := uint32(0); v < h.Ring.vectors(); v++ {
				if x, off := h.Ring.value(v); !h.Ring.fits(uint64(x)) || off > 64<<20 {
					t.Fatalf("ring %d: %#x at %#x", v, x, off)
				}
			}
		}
		if a := c.Agent; a != nil {
			if a.Window.bus()+a.Window.Size < a.Window.bus() && a.Window.bus()+a.Window.Size != 0 {
				t.Fatalf("the window wraps: %+v", a.Window)
			}
			if i := a.Interrupt; i != nil && i.Cause != nil && (i.vectors() < 1 || i.vectors() > 32) {
				t.Fatalf("%d vectors", i.vectors())
			}
		}
	})
}

// TestInterruptKind: the kind of interrupt that the description names is the one that the function is opened for.
func TestInterruptKind(t *testing.T) {
	text := example(t)
	for kind, want := range map[string]pci.InterruptKind{"intx": pci.INTx, "msi": pci.MSI, "msix": pci.MSIX, "any": pci.NoInterrupts} {
		file := filepath.Join(t.TempDir(), kind+".toml")
		if err := os.WriteFile(file, []byte(strings.Replace(text, `kind = "intx"`, `kind = "`+kind+`"`, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		a, c, irq, err := parseHost(file + "@0000:01:00.0")
		if err != nil || !irq || c.Host.Interrupt.Kind != kind || a.Interrupts != want {
			t.Errorf("%s: opened for %s, want %s; interrupts %v, %v", kind, a.Interrupts, want, irq, err)
		}
	}
}
