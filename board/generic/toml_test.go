package generic

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestCheckAll: every problem of both halves, each with its line, its key, and what to write instead.
func TestCheckAll(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       []Problem
	}{
		{"a file of mistakes", `# line 1
name = acme
[host.window]
bar = 2
speed = 9
size = 0x1000_0000_0000_0000_0

[host.wndow]
bar = 1
[host.ring]
width = "32"
big_endian = yes
vectors = 2 offset = 8
no equals sign
[agent.window]
size = 0x10000
size = 0x20000
[agent.window]
window.size = 3
[agent.pool]
`, []Problem{
			{2, "name", "acme: text is written in quotation marks"},
			{5, "host.window.speed", "there is no such key; there are bar, bus_address, map, max_access, memory, min_access, offset, path, size"},
			{6, "host.window.size", "0x1000_0000_0000_0000_0: more than 64 bits"},
			{8, "host.wndow", "there is no such table; there are [host.engine], [host.interrupt], [host.pool], [host.ring], [host.window]"},
			{11, "host.ring.width", `"32": a whole number is wanted, decimal or as 0x1000_0000`},
			{12, "host.ring.big_endian", "yes: true or false is wanted"},
			{13, "host.ring.vectors", `"offset = 8" behind the value: each key is a line of its own`},
			{14, "", `"no equals sign" is not of the form key = value`},
			{17, "agent.window.size", "it stands in line 16 already"},
			{18, "agent.window", "the table is there already, in line 15"},
		}},
		{"values of both halves", `
[host.window]
bar = 9
offset = 4
[host.ring]
width = 24
[host.interrupt]
kind = "nmi"
[agent.window]
offset = 0x1000
memory = "fast"
[agent.interrupt]
vectors = 2
`, []Problem{
			{3, "host.window.bar", "9: BARs are 0 to 5"},
			{4, "host.window.offset", "0x4 is not a multiple of 8"},
			{6, "host.ring.width", "24 bits: a register has 8, 16 or 32"},
			{8, "host.interrupt.kind", `"nmi": msix, msi, intx or any is wanted`},
			{9, "agent.window.size", "is missing: a multiple of 0x1000 from 0x10000 on"},
			{11, "agent.window.memory", `"fast": uncached, write-combining or (agent) cached is wanted`},
			{12, "agent.interrupt.path", "is missing: the UIO device, /dev/uioN"},
			{13, "agent.interrupt.vectors", "2, but one interrupt without a cause register is one"},
		}},
		{"halves that do not agree", "[host.window]\nsize = 0x10000\n[agent.window]\nsize = 0x20000\n", []Problem{
			{2, "host.window.size", "0x10000 is less than the agent's, 0x20000"}}},
		{"nothing", "", []Problem{{0, "host", "neither [host] nor [agent] is there"}}},
		{"a list without an end", "[host.engine]\nto_host = [1,\n# 2\n", []Problem{{2, "host.engine.to_host", "the list has no end: ] is missing"}}},
		{"no list", "[host.engine]\nto_host = 1\n", []Problem{{2, "host.engine.to_host", "1: a list of numbers is wanted, as [2, 3]"}}},
		{"a negative number", "vendor = -1\n", []Problem{{1, "vendor", "-1: 0 to 0xffff is possible"}}},
		{"a large number", "vendor = 0x10000\n", []Problem{{1, "vendor", "0x10000: 0 to 0xffff is possible"}}},
		{"a leading zero", "vendor = 0123\n", []Problem{{1, "vendor", "0123: a decimal number has no leading zero; write 0x or 0o in front of hexadecimal or octal digits"}}},
		{"a table as a value", "host = { window = 1 }\n", []Problem{{1, "host", "it is a table: write [host], and its keys below"}}},
		{"no text", "name = \"a\x00b\"\n", []Problem{{1, "", "byte 0x00 at column 10: a description is text in UTF-8, without control characters"}}},
		{"a backslash", `name = "a\d"`, []Problem{{1, "name", `"a\d": a backslash that means nothing; use '...' for text with backslashes`}}},
	} {
		_, got := Check([]byte(c.text))
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s:\n%s", c.name, d)
		}
	}
}

// TestCheckForms: the ways to write a value.
func TestCheckForms(t *testing.T) {
	text := "name = 'a\\b' # comment\r\nvendor = 0x19_57\ndevice = 0b1000\n[ host . window ] # comment\nbar = +2\n[host.engine]\nkind = \"dw-\\u0065dma\"\nto_host = [ # comment\n 0,\n 0x1, ]\nto_board=[]\n" +
		"window_address=0x40\n[host.engine.descriptors]\nsize = 1_024\n"
	c, problems := Check([]byte(text))
	if problems != nil {
		t.Fatal(problems)
	}
	want := &Config{Name: `a\b`, Vendor: 0x1957, Device: 8, Host: &Host{Window: Window{Place: Place{BAR: 2}},
		Engine: &Engine{Kind: "dw-edma", ToHost: []int{0, 1}, ToBoard: []int{}, WindowAddress: 0x40, Descriptors: &Descriptors{Size: 1024}}}}
	if d := cmp.Diff(want, c); d != "" {
		t.Error(d)
	}
	var other Config
	if err := decode([]byte(text), &other); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&other, c); d != "" {
		t.Errorf("another decoder reads something else: %s", d)
	}
}

// TestFileError: a program that opens the board gives the first problem, and the way to the others.
func TestFileError(t *testing.T) {
	_, problems := Check([]byte("[host.window]\nbar = 9\noffset = 4\n"))
	err := error(&FileError{"x.toml", problems})
	if got, want := err.Error(), "x.toml: line 2: host.window.bar: 9: BARs are 0 to 5 (and 1 more: boardlink check x.toml)"; got != want {
		t.Errorf("%s; want %s", got, want)
	}
	if _, err := Load("/nonexistent/x.toml"); err == nil || errors.As(err, new(*FileError)) || strings.Contains(err.Error(), "line") {
		t.Errorf("a file that is not there: %v", err)
	}
}
