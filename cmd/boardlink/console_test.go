package main

import (
	"strings"
	"testing"

	"github.com/boardlink/boardlink/status"
)

// Escapes are found at the start of a line only, wherever what is typed is cut.
func TestEscapes(t *testing.T) {
	for in, want := range map[string]string{
		"~.":          "<.>",
		"~":           "",
		"~~":          "~",
		"~~.":         "~.",
		"a~.b":        "a~.b",
		"ls\r~.":      "ls\r<.>",
		"ls\n~.":      "ls\n<.>",
		"~?~#~!x~?":   "<?><#><!>x~?",
		"~x~.":        "~x~.",
		"~\r~.":       "~\r<.>",
		"\r~~\r~.y":   "\r~\r<.>y",
		"\x1b[A\r~.~": "\x1b[A\r<.>",
	} {
		for _, size := range []int{1, 2, 3, len(in)} {
			e := escapes{start: true}
			var got strings.Builder
			for left := []byte(in); len(left) > 0; {
				part := left[:min(size, len(left))]
				left = left[len(part):]
				for len(part) > 0 {
					var send []byte
					var act byte
					send, act, part = e.next(part)
					got.Write(send)
					if act != 0 {
						got.WriteString("<" + string(rune(act)) + ">")
					}
				}
			}
			if got.String() != want {
				t.Errorf("%q in parts of %d: %q, want %q", in, size, got.String(), want)
			}
		}
	}
}

func TestChooseConsole(t *testing.T) {
	all := []found{{"/run/a", "board0", status.Device{Name: "con0"}}, {"/run/a", "board1", status.Device{Name: "con0"}}, {"/run/b", "board1", status.Device{Name: "con1"}}, {"/run/b", "other", status.Device{Name: "con0"}}}
	for name, want := range map[string]string{"con1": "/run/b board1", "board0/con0": "/run/a board0", "board1/con1": "/run/b board1",
		"con0":        "con0 is ambiguous: board0/con0 at /run/a, board1/con0 at /run/a, other/con0 at /run/b; name the link too, or the program by --status",
		"con2":        "there is no console con2; there are: board0/con0 board1/con0 board1/con1 other/con0",
		"board0/con1": "there is no console board0/con1; there are: board0/con0 board1/con0 board1/con1 other/con0",
	} {
		f, err := chooseConsole(all, name)
		got := f.path + " " + f.link
		if err != nil {
			got = err.Error()
			if exitStatus(err) != exitUsage {
				t.Errorf("%s: exit status %d", name, exitStatus(err))
			}
		}
		if got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}
