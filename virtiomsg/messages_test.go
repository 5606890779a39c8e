package virtiomsg

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/virtio"
)

// goldens holds every message with its bytes, written by hand after the tables of docs/wire.md.
var goldens = []struct {
	name   string
	encode func(*Slot)
	decode func(*Slot) (any, error)
	want   any
	bytes  string
}{
	{"GET_DEVICE_INFO request", func(s *Slot) { EncodeGetDeviceInfo(s, 1, 0x1234) },
		func(s *Slot) (any, error) { return nil, DecodeEmptyRequest(s, GetDeviceInfo) }, nil,
		"00 02 0100 3412 0800"},
	{"GET_DEVICE_INFO response", func(s *Slot) {
		(&DeviceInfo{DeviceID: 1, VendorID: 0x4b4e4c42, FeatureBits: 128, ConfigSize: 24, MaxQueues: 3, AdminStart: 4, AdminCount: 5}).Encode(s, 1, 0x1234)
	}, func(s *Slot) (any, error) { var m DeviceInfo; err := m.Decode(s); return m, err },
		DeviceInfo{DeviceID: 1, VendorID: 0x4b4e4c42, FeatureBits: 128, ConfigSize: 24, MaxQueues: 3, AdminStart: 4, AdminCount: 5},
		"01 02 0100 3412 2000  01000000 424c4e4b 80000000 18000000 03000000 0400 0500"},
	{"GET_DEVICE_FEATURES request", func(s *Slot) { EncodeGetDeviceFeatures(s, 2, 7, 1, 4) },
		func(s *Slot) (any, error) { i, n, err := DecodeGetDeviceFeatures(s); return [2]uint32{i, n}, err }, [2]uint32{1, 4},
		"00 03 0200 0700 1000  01000000 04000000"},
	{"GET_DEVICE_FEATURES response", func(s *Slot) {
		b := BlocksOf(virtio.FeaturesOf(0, 32, 127), 0, 4)
		b.EncodeResponse(s, 2, 7)
	}, func(s *Slot) (any, error) { var m FeatureBlocks; err := m.DecodeResponse(s); return m, err },
		FeatureBlocks{Index: 0, Count: 4, Data: [12]uint32{1, 1, 0, 0x80000000}},
		"01 03 0200 0700 2000  00000000 04000000 01000000 01000000 00000000 00000080"},
	{"SET_DRIVER_FEATURES request", func(s *Slot) {
		b := BlocksOf(virtio.FeaturesOf(33), 1, 1)
		b.EncodeRequest(s, 2, 8)
	}, func(s *Slot) (any, error) { var m FeatureBlocks; err := m.DecodeRequest(s); return m, err },
		FeatureBlocks{Index: 1, Count: 1, Data: [12]uint32{2}},
		"00 04 0200 0800 1400  01000000 01000000 02000000"},
	{"SET_DRIVER_FEATURES response", func(s *Slot) { EncodeEmptyResponse(s, SetDriverFeatures, 2, 8) },
		func(s *Slot) (any, error) { return nil, DecodeEmptyResponse(s, SetDriverFeatures) }, nil,
		"01 04 0200 0800 0800"},
	{"GET_CONFIG request", func(s *Slot) { EncodeGetConfig(s, 1, 9, 6, 2) },
		func(s *Slot) (any, error) { o, n, err := DecodeGetConfig(s); return [2]uint32{o, n}, err }, [2]uint32{6, 2},
		"00 05 0100 0900 1000  06000000 02000000"},
	{"GET_CONFIG response", func(s *Slot) {
		(&ConfigData{Generation: 5, Offset: 6, Len: 2, Data: [44]byte{1, 2}}).EncodeResponse(s, GetConfig, 1, 9)
	}, func(s *Slot) (any, error) { var m ConfigData; err := m.DecodeResponse(s, GetConfig); return m, err },
		ConfigData{Generation: 5, Offset: 6, Len: 2, Data: [44]byte{1, 2}},
		"01 05 0100 0900 1600  05000000 06000000 02000000 0102"},
	{"SET_CONFIG request", func(s *Slot) {
		(&ConfigData{Generation: 5, Offset: 0, Len: 3, Data: [44]byte{7, 8, 9}}).EncodeRequest(s, 1, 10)
	}, func(s *Slot) (any, error) { var m ConfigData; err := m.DecodeRequest(s); return m, err },
		ConfigData{Generation: 5, Len: 3, Data: [44]byte{7, 8, 9}},
		"00 06 0100 0a00 1700  05000000 00000000 03000000 070809"},
	{"SET_CONFIG response, refused", func(s *Slot) {
		(&ConfigData{Generation: 6}).EncodeResponse(s, SetConfig, 1, 10)
	}, func(s *Slot) (any, error) { var m ConfigData; err := m.DecodeResponse(s, SetConfig); return m, err },
		ConfigData{Generation: 6},
		"01 06 0100 0a00 1400  06000000 00000000 00000000"},
	{"GET_DEVICE_STATUS request", func(s *Slot) { EncodeGetDeviceStatus(s, 1, 11) },
		func(s *Slot) (any, error) { return nil, DecodeEmptyRequest(s, GetDeviceStatus) }, nil,
		"00 07 0100 0b00 0800"},
	{"GET_DEVICE_STATUS response", func(s *Slot) { EncodeStatus(s, GetDeviceStatus, 1, 11, 0x4f) },
		func(s *Slot) (any, error) { return DecodeStatus(s, GetDeviceStatus) }, uint32(0x4f),
		"01 07 0100 0b00 0c00  4f000000"},
	{"SET_DEVICE_STATUS request", func(s *Slot) { EncodeSetDeviceStatus(s, 1, 12, 0x0b) },
		func(s *Slot) (any, error) { return DecodeSetDeviceStatus(s) }, uint32(0x0b),
		"00 08 0100 0c00 0c00  0b000000"},
	{"SET_DEVICE_STATUS response", func(s *Slot) { EncodeStatus(s, SetDeviceStatus, 1, 12, 0x0b) },
		func(s *Slot) (any, error) { return DecodeStatus(s, SetDeviceStatus) }, uint32(0x0b),
		"01 08 0100 0c00 0c00  0b000000"},
	{"GET_VQUEUE request", func(s *Slot) { EncodeQueueRequest(s, GetVQueue, 1, 13, 2) },
		func(s *Slot) (any, error) { return DecodeQueueRequest(s, GetVQueue) }, uint32(2),
		"00 09 0100 0d00 0c00  02000000"},
	{"GET_VQUEUE response", func(s *Slot) {
		(&VQueue{Index: 2, MaxSize: 1024, Size: 256, Desc: 0x1122334455667788, Driver: 0x2000, Device: 0x3000}).EncodeResponse(s, 1, 13)
	}, func(s *Slot) (any, error) { var m VQueue; err := m.DecodeResponse(s); return m, err },
		VQueue{Index: 2, MaxSize: 1024, Size: 256, Desc: 0x1122334455667788, Driver: 0x2000, Device: 0x3000},
		"01 09 0100 0d00 3000  02000000 00040000 00010000 00000000 8877665544332211 0020000000000000 0030000000000000"},
	{"SET_VQUEUE request", func(s *Slot) {
		(&VQueue{Index: 2, MaxSize: 1024, Size: 256, Desc: 0x80001000, Driver: 0x80002000, Device: 0x80003000}).EncodeRequest(s, 1, 14)
	}, func(s *Slot) (any, error) { var m VQueue; err := m.DecodeRequest(s); return m, err },
		VQueue{Index: 2, Size: 256, Desc: 0x80001000, Driver: 0x80002000, Device: 0x80003000},
		"00 0a 0100 0e00 3000  02000000 00000000 00010000 00000000 0010008000000000 0020008000000000 0030008000000000"},
	{"SET_VQUEUE response", func(s *Slot) { EncodeEmptyResponse(s, SetVQueue, 1, 14) },
		func(s *Slot) (any, error) { return nil, DecodeEmptyResponse(s, SetVQueue) }, nil,
		"01 0a 0100 0e00 0800"},
	{"RESET_VQUEUE request", func(s *Slot) { EncodeQueueRequest(s, ResetVQueue, 1, 15, 2) },
		func(s *Slot) (any, error) { return DecodeQueueRequest(s, ResetVQueue) }, uint32(2),
		"00 0b 0100 0f00 0c00  02000000"},
	{"RESET_VQUEUE response", func(s *Slot) { EncodeEmptyResponse(s, ResetVQueue, 1, 15) },
		func(s *Slot) (any, error) { return nil, DecodeEmptyResponse(s, ResetVQueue) }, nil,
		"01 0b 0100 0f00 0800"},
	{"GET_SHM request", func(s *Slot) { EncodeQueueRequest(s, GetShm, 1, 16, 0) },
		func(s *Slot) (any, error) { return DecodeQueueRequest(s, GetShm) }, uint32(0),
		"00 0c 0100 1000 0c00  00000000"},
	{"GET_SHM response", func(s *Slot) { (&Shm{Index: 1, Len: 2, Addr: 3}).Encode(s, 1, 16) },
		func(s *Slot) (any, error) { var m Shm; err := m.Decode(s); return m, err }, Shm{Index: 1, Len: 2, Addr: 3},
		"01 0c 0100 1000 1400  01000000 02000000 03000000"},
	{"EVENT_CONFIG", func(s *Slot) {
		(&ConfigEvent{Status: 0x4f, Generation: 3, Offset: 6, Len: 2, Data: [40]byte{1, 0}}).Encode(s, 1)
	}, func(s *Slot) (any, error) { var m ConfigEvent; err := m.Decode(s); return m, err },
		ConfigEvent{Status: 0x4f, Generation: 3, Offset: 6, Len: 2, Data: [40]byte{1, 0}},
		"00 40 0100 0000 1a00  4f000000 03000000 06000000 02000000 0100"},
	{"EVENT_AVAIL", func(s *Slot) { (&AvailEvent{Queue: 1, Next: 5, Wrap: true}).Encode(s, 1) },
		func(s *Slot) (any, error) { var m AvailEvent; err := m.Decode(s); return m, err }, AvailEvent{Queue: 1, Next: 5, Wrap: true},
		"00 41 0100 0000 1000  01000000 05000080"},
	{"EVENT_USED", func(s *Slot) { EncodeEventUsed(s, 1, 3) },
		func(s *Slot) (any, error) { return DecodeEventUsed(s) }, uint32(3),
		"00 42 0100 0000 0c00  03000000"},
	{"EVENT_LINK", func(s *Slot) { EncodeLink(s, 1, true) },
		func(s *Slot) (any, error) { return DecodeLink(s) }, true,
		"00 60 0100 0000 0c00  01000000"},
	{"bus GET_DEVICES request", func(s *Slot) { EncodeGetDevices(s, 17, 8, 64) },
		func(s *Slot) (any, error) { o, n, err := DecodeGetDevices(s); return [2]uint16{o, n}, err }, [2]uint16{8, 64},
		"02 02 0000 1100 0c00  0800 4000"},
	{"bus GET_DEVICES response", func(s *Slot) {
		m := Devices{Offset: 8, Count: 16, Next: 24}
		m.Set(8)
		m.Set(17)
		m.Set(24) // not covered
		m.Encode(s, 17)
	}, func(s *Slot) (any, error) { var m Devices; err := m.Decode(s); return m, err },
		Devices{Offset: 8, Count: 16, Next: 24, Bitmap: [50]byte{1, 2}},
		"03 02 0000 1100 1000  0800 1000 1800 0102"},
	{"bus PING request", func(s *Slot) { EncodePing(s, 18, 0xdeadbeef) },
		func(s *Slot) (any, error) { return DecodePing(s) }, uint32(0xdeadbeef),
		"02 03 0000 1200 0c00  efbeadde"},
	{"bus PING response", func(s *Slot) { EncodePong(s, 18, 0xdeadbeef) },
		func(s *Slot) (any, error) { return DecodePong(s) }, uint32(0xdeadbeef),
		"03 03 0000 1200 0c00  efbeadde"},
	{"bus EVENT_DEVICE", func(s *Slot) { (&DeviceEvent{Dev: 5, State: DeviceRemoved}).Encode(s) },
		func(s *Slot) (any, error) { var m DeviceEvent; err := m.Decode(s); return m, err }, DeviceEvent{Dev: 5, State: 2},
		"02 40 0000 0000 0c00  0500 0200"},
}

func goldenSlot(t testing.TB, s string) Slot {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	var m Slot
	copy(m[:], b)
	return m
}

// TestGoldenMessages holds every message against its bytes, both ways, and takes each one apart: any
// other size and any other message is refused.
func TestGoldenMessages(t *testing.T) {
	for i, g := range goldens {
		t.Run(g.name, func(t *testing.T) {
			want := goldenSlot(t, g.bytes)
			got := Slot{63: 0xff} // the tail must be cleared
			g.encode(&got)
			if !bytes.Equal(got[:], want[:]) {
				t.Fatalf("encoded\n%x\nwant\n%x", got, want)
			}
			v, err := g.decode(&want)
			if err != nil || v != g.want {
				t.Fatalf("decoded %+v, %v; want %+v", v, err, g.want)
			}
			h, err := want.Header()
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(h.String(), strings.Split(g.name, ",")[0][:8]) {
				t.Errorf("String: %s", h)
			}
			for size := 0; size < 300; size++ {
				if size == int(h.Size) {
					continue
				}
				s := want
				s[6], s[7] = byte(size), byte(size>>8)
				if _, err := g.decode(&s); !errors.Is(err, ErrSize) {
					t.Fatalf("size %d: %v", size, err)
				}
			}
			for j, o := range goldens {
				s := goldenSlot(t, o.bytes)
				if _, err := g.decode(&s); j != i && err == nil {
					t.Errorf("%s is taken for it", o.name)
				}
			}
		})
	}
}

// TestGoldenHeader: the words of the header, in which no two bytes are alike.
func TestGoldenHeader(t *testing.T) {
	var s Slot
	EncodeGetDeviceStatus(&s, 0x0102, 0x0304)
	want := goldenSlot(t, "00 07 0201 0403 0800")
	if s != want {
		t.Errorf("encoded\n%x\nwant\n%x", s, want)
	}
	h, err := want.Header()
	if err != nil || h.Dev != 0x0102 || h.Token != 0x0304 || h.Size != 8 {
		t.Errorf("%v, %+v", err, h)
	}
}

func TestBadMessages(t *testing.T) {
	for name, c := range map[string]struct {
		bytes  string
		decode func(*Slot) error
		want   error
	}{
		"reserved type bits":      {"04 02 0100 3412 0800", nil, ErrReserved},
		"response to an event":    {"01 40 0100 0000 1800", nil, ErrType},
		"device on the bus":       {"02 03 0100 1200 0c00 00000000", nil, ErrReserved},
		"request without a token": {"00 02 0100 0000 0800", nil, ErrToken},
		"event with a token":      {"00 42 0100 0100 0c00 03000000", nil, ErrToken},
		"all-ones":                {strings.Repeat("ff", 64), nil, ErrSize},
		"zeros":                   {"00", nil, ErrSize},
		"13 feature blocks": {"01 03 0200 0700 4000 00000000 0d000000",
			func(s *Slot) error { return new(FeatureBlocks).DecodeResponse(s) }, ErrBounds},
		"2^30 feature blocks": {"01 03 0200 0700 1000 00000000 00000040",
			func(s *Slot) error { return new(FeatureBlocks).DecodeResponse(s) }, ErrBounds},
		"GET_CONFIG of 45 bytes": {"00 05 0100 0900 1000 00000000 2d000000",
			func(s *Slot) error { _, _, err := DecodeGetConfig(s); return err }, ErrBounds},
		"GET_CONFIG past 2^32": {"00 05 0100 0900 1000 ffffffff 02000000",
			func(s *Slot) error { _, _, err := DecodeGetConfig(s); return err }, ErrBounds},
		"SET_CONFIG past 2^32": {"00 06 0100 0900 1600 00000000 ffffffff 02000000",
			func(s *Slot) error { return new(ConfigData).DecodeRequest(s) }, ErrBounds},
		"EVENT_CONFIG of 41 bytes": {"00 40 0100 0000 4000 00000000 00000000 00000000 29000000",
			func(s *Slot) error { return new(ConfigEvent).Decode(s) }, ErrBounds},
		"SET_VQUEUE, bytes 4 to 7": {"00 0a 0100 0e00 3000 02000000 01000000",
			func(s *Slot) error { return new(VQueue).DecodeRequest(s) }, ErrReserved},
		"SET_VQUEUE, bytes 12 to 15": {"00 0a 0100 0e00 3000 02000000 00000000 00010000 01000000",
			func(s *Slot) error { return new(VQueue).DecodeRequest(s) }, ErrReserved},
		"GET_VQUEUE, bytes 12 to 15": {"01 09 0100 0e00 3000 02000000 00040000 00010000 01000000",
			func(s *Slot) error { return new(VQueue).DecodeResponse(s) }, ErrReserved},
		"GET_DEVICES from 4": {"02 02 0000 1100 0c00 0400 4000",
			func(s *Slot) error { _, _, err := DecodeGetDevices(s); return err }, ErrBounds},
		"GET_DEVICES that turns back": {"03 02 0000 1100 0f00 1000 0800 0800 01",
			func(s *Slot) error { return new(Devices).Decode(s) }, ErrBounds},
		"GET_DEVICES of 408": {"03 02 0000 1100 4000 0000 9801 0000",
			func(s *Slot) error { return new(Devices).Decode(s) }, ErrBounds},
	} {
		t.Run(name, func(t *testing.T) {
			s := goldenSlot(t, c.bytes)
			var err error
			if c.decode == nil {
				_, err = s.Header()
			} else {
				err = c.decode(&s)
			}
			var me *MessageError
			if !errors.Is(err, c.want) || !errors.As(err, &me) || me.Error() == "" {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestFeatures(t *testing.T) {
	f := virtio.FeaturesOf(0, 31, 32, 63, 64, 127)
	// Any cut into blocks carries the whole.
	for n := uint32(1); n <= 12; n++ {
		var g virtio.Features
		for i := uint32(0); i < 4; i += n {
			b := BlocksOf(f, i, n)
			if b.Count != n {
				t.Fatal(b.Count)
			}
			if err := b.Store(&g); err != nil {
				t.Fatal(err)
			}
		}
		if g != f {
			t.Errorf("in blocks of %d: %x, want %x", n, g, f)
		}
	}
	if b := BlocksOf(f, 0xffffffff, 0xffffffff); b.Count != 12 || b.Data != [12]uint32{} {
		t.Errorf("%+v", b)
	}
	b := FeatureBlocks{Index: 3, Count: 2, Data: [12]uint32{0, 1}}
	if err := b.Store(&f); err != ErrBounds {
		t.Errorf("bit 128: %v", err)
	}
}

func TestVector(t *testing.T) {
	for _, c := range [][4]uint32{{0, 0, 0, 0}, {3, 1, 1, 0}, {0, 0, 2, 1}, {9, 1, 2, 1}, {0, 0, 5, 1}, {0, 1, 5, 2}, {1, 0, 5, 3}, {1, 1, 5, 4}, {2, 0, 5, 1},
		{0xffff, 1, 0x10000, 2}, {0, 2, 1, 0}, {0, 2, 2, 1}, {0, 2, 8, 7}, {0, 3, 8, 6}, {0, 8, 8, 1}, {0, 9, 8, 7}, {1, 2, 8, 5}, {1, 3, 8, 4}, {0, 8, 10, 3},
		{0xffff, 0xffffffff, 0x10000, 2}} {
		if v := Vector(uint16(c[0]), c[1], c[2]); v != c[3] {
			t.Errorf("device %d, queue %d, %d vectors: %d, want %d", c[0], c[1], c[2], v, c[3])
		}
	}
}

func TestRequests(t *testing.T) {
	var r Requests
	tok, err := r.Begin(false, GetVQueue, 1)
	if err != nil || tok == 0 {
		t.Fatal(tok, err)
	}
	good := Header{Type: TypeResponse, ID: GetVQueue, Dev: 1, Token: tok}
	for _, h := range []Header{
		{ID: GetVQueue, Dev: 1, Token: tok},
		{Type: TypeResponse, ID: SetVQueue, Dev: 1, Token: tok},
		{Type: TypeResponse, ID: GetVQueue, Dev: 2, Token: tok},
		{Type: TypeResponse | TypeBus, ID: GetVQueue, Dev: 1, Token: tok},
		{Type: TypeResponse, ID: GetVQueue, Dev: 1, Token: tok + 1},
		{Type: TypeResponse, ID: 0, Dev: 0, Token: 0},
	} {
		if r.Match(h) {
			t.Errorf("%s matches", h)
		}
	}
	if r.Stale != 6 || r.n != 1 {
		t.Error(r.Stale, r.n)
	}
	if !r.Match(good) || r.Match(good) || r.n != 0 || r.Stale != 7 {
		t.Error("an answer counts once")
	}
	tok, _ = r.Begin(true, BusPing, 0)
	if r.Cancel(0) || !r.Cancel(tok) || r.Cancel(tok) || r.Match(Header{Type: TypeResponse | TypeBus, ID: BusPing, Token: tok}) {
		t.Error("a cancelled request still waits")
	}
	// All tokens come round, none is 0, none is given twice at a time.
	held, _ := r.Begin(true, BusPing, 0)
	for i := 0; i < 200000; i++ {
		tok, err := r.Begin(true, BusPing, 0)
		if err != nil || tok == 0 || tok == held {
			t.Fatal(tok, err)
		}
		r.Cancel(tok)
	}
	for i := 1; i < MaxRequests; i++ {
		if _, err := r.Begin(true, BusPing, 0); err != nil {
			t.Fatal(i, err)
		}
	}
	if _, err := r.Begin(true, BusPing, 0); err != ErrTooMany {
		t.Error(err)
	}
	if n := r.Reset(); n != MaxRequests || r.n != 0 {
		t.Error(n)
	}
}

// FuzzSlot: whatever a slot holds is refused or understood; what is understood encodes to the same
// bytes again.
func FuzzSlot(f *testing.F) {
	for _, g := range goldens {
		s := goldenSlot(f, g.bytes)
		f.Add(s[:])
	}
	f.Add(bytes.Repeat([]byte{0xff}, 64))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s, back Slot
		copy(s[:], b)
		h, err := s.Header()
		if err != nil {
			return
		}
		_ = h.String()
		for i := int(h.Size); i < SlotSize; i++ {
			s[i] = 0 // not part of the message
		}
		for _, g := range goldens {
			v, err := g.decode(&s)
			if err != nil {
				continue
			}
			switch m := v.(type) {
			case DeviceInfo:
				m.Encode(&back, h.Dev, h.Token)
			case FeatureBlocks:
				if h.Response() {
					m.EncodeResponse(&back, h.Dev, h.Token)
				} else {
					m.EncodeRequest(&back, h.Dev, h.Token)
				}
				var fs virtio.Features
				_ = m.Store(&fs)
			case ConfigData:
				if h.Response() {
					m.EncodeResponse(&back, h.ID, h.Dev, h.Token)
				} else {
					m.EncodeRequest(&back, h.Dev, h.Token)
				}
			case VQueue:
				if h.Response() {
					m.EncodeResponse(&back, h.Dev, h.Token)
				} else {
					m.EncodeRequest(&back, h.Dev, h.Token)
				}
			case Shm:
				m.Encode(&back, h.Dev, h.Token)
			case ConfigEvent:
				m.Encode(&back, h.Dev)
			case AvailEvent:
				m.Encode(&back, h.Dev)
			case Devices:
				m.Encode(&back, h.Token)
				_ = m.Has(m.Offset + m.Count - 1)
			case DeviceEvent:
				m.Encode(&back)
			default:
				continue
			}
			if back != s {
				t.Fatalf("%s: %x decodes to %+v, which encodes to %x", g.name, s, v, back)
			}
		}
	})
}

// TestSupersedes: of several events that were not looked at yet, the last tells all; that a device was removed is not
// lost where it comes again.
func TestSupersedes(t *testing.T) {
	ev := func(f func(s *Slot)) (s Slot) { f(&s); return s }
	config := func(dev uint16, status uint32) Slot {
		return ev(func(s *Slot) { (&ConfigEvent{Status: status}).Encode(s, dev) })
	}
	device := func(dev, state uint16) Slot {
		return ev(func(s *Slot) { (&DeviceEvent{Dev: dev, State: state}).Encode(s) })
	}
	ping := ev(func(s *Slot) { EncodePing(s, 1, 1) })
	used := func(q uint32) Slot { return ev(func(s *Slot) { EncodeEventUsed(s, 1, q) }) }
	for i, c := range []struct {
		later, earlier Slot
		want           bool
	}{
		{config(1, 15), config(1, 79), true},
		{config(1, 15), config(2, 15), false},
		{device(1, DeviceRemoved), device(1, DeviceReady), true},
		{device(1, DeviceRemoved), device(1, DeviceRemoved), true},
		{device(1, DeviceReady), device(1, DeviceReady), true},
		{device(1, DeviceReady), device(1, DeviceRemoved), false},
		{device(1, DeviceReady), device(2, DeviceReady), false},
		{used(1), used(1), true},
		{used(1), used(2), false},
		{config(0, 15), device(0, DeviceReady), false},
		{ev(func(s *Slot) { EncodeLink(s, 1, false) }), ev(func(s *Slot) { EncodeLink(s, 1, true) }), true},
		{ping, ping, false},
		{Slot{}, Slot{}, false},
	} {
		if got := Supersedes(&c.later, &c.earlier); got != c.want {
			t.Errorf("case %d: %v", i, got)
		}
	}
}
