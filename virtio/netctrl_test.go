package virtio

import "testing"

func TestNetCtrlPairs(t *testing.T) {
	if b := EncodeNetCtrlPairs(0x0102); b != [4]byte{4, 0, 2, 1} {
		t.Errorf("% x", b) // virtio 1.2, 5.1.6.5 and 5.1.6.5.5
	}
	for _, c := range []struct {
		b      []byte
		length uint32
		want   int // 0: refused
	}{
		{[]byte{4, 0, 1, 0}, 4, 1},
		{[]byte{4, 0, 4, 0}, 4, 4},
		{[]byte{4, 0, 0, 0}, 4, 0},
		{[]byte{4, 0, 5, 0}, 4, 0},
		{[]byte{4, 0, 4, 1}, 4, 0},
		{[]byte{4, 0, 0xff, 0xff}, 4, 0},
		{[]byte{4, 1, 1, 0}, 4, 0},
		{[]byte{3, 0, 1, 0}, 4, 0},
		{[]byte{4, 0, 1}, 3, 0},
		{[]byte{4, 0, 1, 0}, 5, 0},
		{[]byte{4, 0, 1, 0}, 1 << 31, 0},
		{[]byte{4}, 1, 0},
		{nil, 0, 0},
	} {
		n, err := DecodeNetCtrlPairs(c.b, c.length, 4)
		if n != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("% x of %d bytes: %d, %v; want %d", c.b, c.length, n, err, c.want)
		}
	}
}

func TestNetQueueNames(t *testing.T) {
	want := []string{"rx0", "tx0", "rx1", "tx1", "ctrl"}
	for i, w := range want {
		if got := NetQueueName(i, 2); got != w {
			t.Errorf("queue %d is %s, want %s", i, got, w)
		}
	}
	if NetQueueRX(3) != 6 || NetQueueTX(3) != 7 || NetQueueCtrl(4) != 8 || NetQueueName(2, 1) != "ctrl" {
		t.Error("numbers of virtio 1.2, 5.1.2")
	}
}
