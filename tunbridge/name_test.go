package tunbridge

import (
	"strings"
	"testing"
)

// TestNameInWords: an error shows the character that was typed, not one byte of it as another character.
func TestNameInWords(t *testing.T) {
	for name, want := range map[string]string{"grün0": "'ü' (at byte 2)", "eth世": "'世' (at byte 3)", "a\xff": "0xff (at byte 1)", "a b": "' ' (at byte 1)", "a/b": "'/' (at byte 1)"} {
		err := checkName(name)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "Ã") {
			t.Errorf("%q: %v; want %s", name, err, want)
		}
	}
}
