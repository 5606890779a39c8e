package virtio

import (
	"strings"
	"testing"
)

// needs is the list of virtio 1.2, 5.1.3.1, as far as boardlink has the bits, written once more by the numbers of 5.1.3.
var needs = map[Feature][]Feature{
	1:  {7, 8, 54, 55}, // GUEST_CSUM: GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6
	0:  {11, 12, 56},   // CSUM: HOST_TSO4, HOST_TSO6, HOST_USO
	17: {22},           // CTRL_VQ: MQ
}

// Each bit that needs another one is refused without it, and taken out, with that bit alone; with it, it stays.
func TestNetNeeds(t *testing.T) {
	all := FeaturesOf(Version1, NetMrgRxbuf, NetMTU, NetMAC, NetStatus, NetRawIP)
	rules := 0
	for need, bits := range needs {
		all.Set(need)
		for _, b := range bits {
			all.Set(b)
			rules++
		}
	}
	if rules != len(netNeeds) {
		t.Errorf("%d rules, the specification has %d", len(netNeeds), rules)
	}
	if err := CheckNet(all); err != nil || WithoutOrphans(all) != all {
		t.Errorf("all: %v, left %s", err, WithoutOrphans(all))
	}
	if err := CheckNet(Features{}); err != nil || WithoutOrphans(Features{}) != (Features{}) {
		t.Errorf("none: %v", err)
	}
	for need, bits := range needs {
		lacking := all.Without(FeaturesOf(need))
		if got, want := WithoutOrphans(lacking), lacking.Without(FeaturesOf(bits...)); got != want {
			t.Errorf("without %s: %s is left, want %s", need, got, want)
		}
		for _, b := range bits {
			if err := CheckNet(FeaturesOf(Version1, b)); err == nil || !strings.Contains(err.Error(), b.String()+" without "+need.String()+" ") {
				t.Errorf("%s without %s: %v", b, need, err)
			}
			if err := CheckNet(FeaturesOf(b, need)); err != nil {
				t.Errorf("%s with %s: %v", b, need, err)
			}
		}
	}
	// Of every choice of these bits, what is left can be accepted, and nothing else went.
	var bits []Feature
	for need, b := range needs {
		bits = append(append(bits, need), b...)
	}
	for choice := 0; choice < 1<<len(bits); choice++ {
		f := FeaturesOf(Version1)
		for i, b := range bits {
			if choice>>i&1 != 0 {
				f.Set(b)
			}
		}
		g := WithoutOrphans(f)
		if err := CheckNet(g); err != nil || g.Without(f) != (Features{}) || CheckNet(f) == nil && g != f {
			t.Fatalf("%s: %s is left: %v", f, g, err)
		}
	}
}
