package vmtest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestInner is what TestParse reads the output of.
func TestInner(t *testing.T) {
	if os.Getenv("VMTEST_INNER") == "" {
		t.Skip("only run by TestParse")
	}
	t.Run("good", func(t *testing.T) {
		t.Log("a log of good")
		os.Stdout.WriteString("--- FAIL: TestInner/good (0.00s)\n") // no end of ours
		os.Stdout.WriteString("no newline")
	})
	t.Run("bad/with a slash", func(t *testing.T) { t.Error("a log of bad") })
	t.Run("lacks", func(t *testing.T) { t.Skip("a log of lacks") })
	t.Run("deep", func(t *testing.T) {
		t.Run("er", func(t *testing.T) {})
	})
}

func TestInnerPanic(t *testing.T) {
	if os.Getenv("VMTEST_INNER") == "" {
		t.Skip("only run by TestParse")
	}
	panic("on purpose")
}

type flat struct {
	Name, Action string
	Subs         []flat
}

func flatten(rs []*result) (out []flat) {
	for _, r := range rs {
		out = append(out, flat{r.name, r.action, flatten(r.subs)})
	}
	return out
}

func TestParse(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestInner", "-test.v=test2json")
	cmd.Env = append(os.Environ(), "VMTEST_INNER=1")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("the inner tests: %v", err)
	}
	root, _, err := parse(context.Background(), out)
	if err != nil {
		t.Fatal(err)
	}
	want := []flat{
		{"TestInner", "fail", []flat{
			{"good", "pass", nil},
			{"bad/with_a_slash", "fail", nil},
			{"lacks", "skip", nil},
			{"deep", "pass", []flat{{"er", "pass", nil}}},
		}},
		{"TestInnerPanic", "", nil}, // it did not end
	}
	if d := cmp.Diff(want, flatten(root)); d != "" {
		t.Errorf("%s\n%s", d, out)
	}
	for i, text := range []string{"a log of good", "a log of bad", "a log of lacks"} {
		if got := root[0].subs[i].output.String(); !strings.Contains(got, text) {
			t.Errorf("%s: its output %q lacks %q", root[0].subs[i].name, got, text)
		}
	}
	if got := root[1].output.String(); !strings.Contains(got, "panic: on purpose") {
		t.Errorf("the panic is lost: %q", got)
	}
}
