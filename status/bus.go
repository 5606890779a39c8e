package status

// Traffic counts accesses across the bus on the data path. Reads back before sleeping, FlushReads, are apart: there is one for a
// sleep at most, whatever the number of packets.
type Traffic struct {
	Reads      uint64 `json:"reads"`
	ReadBytes  uint64 `json:"read_bytes"`
	Writes     uint64 `json:"writes"`
	WriteBytes uint64 `json:"write_bytes"`
	FlushReads uint64 `json:"flush_reads"`
}

// Plus returns the sum of t and o.
func (t Traffic) Plus(o Traffic) Traffic {
	return Traffic{t.Reads + o.Reads, t.ReadBytes + o.ReadBytes, t.Writes + o.Writes, t.WriteBytes + o.WriteBytes, t.FlushReads + o.FlushReads}
}

// Minus returns what t has more than o, which was counted before.
func (t Traffic) Minus(o Traffic) Traffic {
	return Traffic{t.Reads - o.Reads, t.ReadBytes - o.ReadBytes, t.Writes - o.Writes, t.WriteBytes - o.WriteBytes, t.FlushReads - o.FlushReads}
}

// Bus is the traffic of virtqueues by what it is for.
type Bus struct {
	Descriptor Traffic `json:"descriptor"` // descriptor area and indirect tables
	Driver     Traffic `json:"driver"`     // driver area
	Device     Traffic `json:"device"`     // device area
	Payload    Traffic `json:"payload"`    // frames and their virtio-net headers
}

// Plus returns the sum of b and o.
func (b Bus) Plus(o Bus) Bus {
	return Bus{b.Descriptor.Plus(o.Descriptor), b.Driver.Plus(o.Driver), b.Device.Plus(o.Device), b.Payload.Plus(o.Payload)}
}

// Minus returns what b has more than o, which was counted before.
func (b Bus) Minus(o Bus) Bus {
	return Bus{b.Descriptor.Minus(o.Descriptor), b.Driver.Minus(o.Driver), b.Device.Minus(o.Device), b.Payload.Minus(o.Payload)}
}

// Total returns the traffic for everything.
func (b Bus) Total() Traffic {
	return b.Descriptor.Plus(b.Driver).Plus(b.Device).Plus(b.Payload)
}

// PerFrame is Traffic for each frame.
type PerFrame struct {
	Reads      float64 `json:"reads_per_packet"`
	Writes     float64 `json:"writes_per_packet"`
	ReadBytes  float64 `json:"read_bytes_per_packet"`
	WriteBytes float64 `json:"write_bytes_per_packet"`
	FlushReads float64 `json:"flush_reads_per_packet"`
}

// PerFrame returns the traffic for each of so many frames; nothing for none.
func (t Traffic) PerFrame(frames uint64) PerFrame {
	if frames == 0 {
		return PerFrame{}
	}
	per := func(n uint64) float64 { return float64(n) / float64(frames) }
	return PerFrame{per(t.Reads), per(t.Writes), per(t.ReadBytes), per(t.WriteBytes), per(t.FlushReads)}
}

// BusPerFrame is Bus for each frame: in all, and by area.
type BusPerFrame struct {
	Frames uint64 `json:"packets"`
	PerFrame
	Areas Areas `json:"areas"`
}

// Areas is Bus for each frame, by area.
type Areas struct {
	Descriptor PerFrame `json:"descriptor"`
	Driver     PerFrame `json:"driver"`
	Device     PerFrame `json:"device"`
	Payload    PerFrame `json:"payload"`
}

// PerFrame returns the traffic for each of so many frames; nothing for none.
func (b Bus) PerFrame(frames uint64) BusPerFrame {
	return BusPerFrame{Frames: frames, PerFrame: b.Total().PerFrame(frames), Areas: Areas{
		Descriptor: b.Descriptor.PerFrame(frames), Driver: b.Driver.PerFrame(frames),
		Device: b.Device.PerFrame(frames), Payload: b.Payload.PerFrame(frames)}}
}
