package share

import "testing"

func TestSplit(t *testing.T) {
	for _, tc := range [][3]uint64{{MinSize, MinSize, 0}, {PoolMinSize / 2, PoolMinSize / 2, 0}, {PoolMinSize, PoolMinSize / 2, PoolMinSize / 2}, {1 << 30, 1 << 29, 1 << 29}} {
		if w, p := Split(tc[0]); w != tc[1] || p != tc[2] {
			t.Errorf("Split(%#x) = %#x, %#x", tc[0], w, p)
		}
	}
}
