package virtio

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The configuration space, header and segment are wire formats: byte for byte, at the offsets of virtio 1.2, 5.2.4 and 5.2.6.
func TestBlkGolden(t *testing.T) {
	c := BlkConfig{Capacity: 0x0102030405060708, SizeMax: 0x11121314, SegMax: 0x21222324, BlkSize: 4096, PhysExp: 3, Offset: 1, MinIO: 0x0809,
		OptIO: 0x31323334, Writeback: true, NumQueues: 0x0102, MaxDiscard: 0x41424344, MaxDiscardSegs: 0x51525354, DiscardAlign: 0x61626364,
		MaxZeroes: 0x71727374, MaxZeroesSegs: 0x81828384, ZeroesMayUnmap: true}
	want := [BlkConfigLen]byte{8, 7, 6, 5, 4, 3, 2, 1, 0x14, 0x13, 0x12, 0x11, 0x24, 0x23, 0x22, 0x21,
		0, 0, 0, 0, 0, 0x10, 0, 0, 3, 1, 9, 8, 0x34, 0x33, 0x32, 0x31,
		1, 0, 2, 1, 0x44, 0x43, 0x42, 0x41, 0x54, 0x53, 0x52, 0x51, 0x64, 0x63, 0x62, 0x61,
		0x74, 0x73, 0x72, 0x71, 0x84, 0x83, 0x82, 0x81, 1, 0, 0, 0}
	if got := c.Encode(); got != want {
		t.Errorf("configuration % x, want % x", got, want)
	}
	if got := DecodeBlkConfig(want[:]); got != c {
		t.Errorf("decoded %+v, want %+v", got, c)
	}
	if got := DecodeBlkConfig(want[:8]); got != (BlkConfig{Capacity: c.Capacity}) {
		t.Errorf("of 8 bytes: %+v", got)
	}
	h := BlkHeader{Type: BlkTDiscard, Sector: 0x0102030405060708}
	if got, want := h.Encode(), [BlkHeaderLen]byte{11, 0, 0, 0, 0, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1}; got != want || DecodeBlkHeader(want[:]) != h {
		t.Errorf("header % x, want % x", got, want)
	}
	s := BlkSegment{Sector: 0x0102030405060708, Sectors: 0x11121314, Flags: BlkUnmap}
	if got, want := s.Encode(), [BlkSegmentLen]byte{8, 7, 6, 5, 4, 3, 2, 1, 0x14, 0x13, 0x12, 0x11, 1, 0, 0, 0}; got != want || DecodeBlkSegment(want[:]) != s {
		t.Errorf("segment % x, want % x", got, want)
	}
}

func TestBlkNames(t *testing.T) {
	if d := cmp.Diff([]string{"seg_max", "ro", "flush", "config_wce", "write_zeroes", "event_idx", "version_1"},
		BlkNames(FeaturesOf(BlkSegMax, BlkRO, BlkFlush, BlkConfigWCE, BlkWriteZeroes, EventIdx, Version1))); d != "" {
		t.Error(d)
	}
}
