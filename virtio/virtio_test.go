package virtio

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFeatures(t *testing.T) {
	s := FeaturesOf(NetCSUM, Version1, NetHostUSO, NetRawIP)
	if s != (Features{1, 1 | 1<<24, 0, 1 << 31}) {
		t.Fatalf("blocks %#x", s)
	}
	if d := cmp.Diff([]string{"csum", "version_1", "host_uso", "raw_ip"}, s.Names()); d != "" {
		t.Fatal(d)
	}
	for f := 0; f < 128; f++ {
		g, err := ParseFeature(Feature(f).String())
		if err != nil || int(g) != f {
			t.Fatalf("bit %d: parsed back as %d, %v", f, g, err)
		}
		if s.Has(Feature(f)) != FeaturesOf(Feature(f)).And(s).Has(Feature(f)) {
			t.Fatalf("bit %d: And", f)
		}
		if FeaturesOf(Feature(f)).Without(FeaturesOf(Feature(f))) != (Features{}) {
			t.Fatalf("bit %d: Without", f)
		}
	}
	for _, bad := range []string{"", "bit128", "bit-1", "bit07", "CSUM", "bit1x"} {
		if _, err := ParseFeature(bad); err == nil {
			t.Errorf("%q was taken for a feature", bad)
		}
	}
}

// The configuration space is a wire format: byte for byte.
func TestNetConfigGolden(t *testing.T) {
	c := NetConfig{MAC: [6]byte{2, 1, 2, 3, 4, 5}, LinkUp: true, MaxQueuePairs: 0x0102, MTU: 65000}
	got := c.Encode()
	want := [NetConfigLen]byte{2, 1, 2, 3, 4, 5, 1, 0, 2, 1, 0xe8, 0xfd}
	if got != want {
		t.Fatalf("got % x, want % x", got, want)
	}
	if DecodeNetConfig(want[:]) != c {
		t.Fatalf("decoded %+v", DecodeNetConfig(want[:]))
	}
	if DecodeNetConfig(want[:6]).MAC != c.MAC {
		t.Fatal("a short configuration space")
	}
}

func TestStatusString(t *testing.T) {
	for s, want := range map[uint32]string{0: "reset", 15: "ACKNOWLEDGE|DRIVER|FEATURES_OK|DRIVER_OK", 0x140: "NEEDS_RESET|0x100"} {
		if got := StatusString(s); got != want {
			t.Errorf("%#x: %s, want %s", s, got, want)
		}
	}
}
