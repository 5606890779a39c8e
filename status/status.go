// Package status is what a running host or agent tells of itself: links, devices, queues, every
// counter. The same shapes serve `boardlink status`, its JSON, and metrics.
//
// In the room: the shapes and how counters become names and numbers. Never in it: who
// counts, how it is served or printed.
package status

import (
	"reflect"
	"unicode"
)

// Program is a running host or agent.
type Program struct {
	Version string `json:"version"`
	Side    string `json:"side"` // "host" or "agent"
	PID     int    `json:"pid"`
	Started string `json:"started"` // RFC 3339
	// LogLost counts lines of the program's log that nobody read in time.
	LogLost uint64 `json:"log_lost"`
	Links   []Link `json:"links"`
}

// Link is one board's link as this side sees it.
type Link struct {
	Name      string            `json:"name"`
	Board     string            `json:"board"`            // "loopback:/run/a.sock"
	State     string            `json:"state"`            // one of the states of docs/architecture.md: "up", "waiting for the peer"
	Reason    string            `json:"reason,omitempty"` // what led to the state, where it tells: "no heartbeat"
	Since     string            `json:"since"`            // of the state, RFC 3339
	Epoch     uint32            `json:"epoch"`
	PeerEpoch uint32            `json:"peer_epoch"`
	LastError string            `json:"last_error,omitempty"`
	Placement string            `json:"placement"`
	Window    Window            `json:"window"`
	Regions   []Region          `json:"regions"`
	Counters  map[string]uint64 `json:"counters"` // of the link: ups, losses, messages
	Bus       map[string]uint64 `json:"bus"`      // accesses across the bus
	Devices   []Device          `json:"devices"`
}

// Window is the memory that both sides see.
type Window struct {
	Size uint64 `json:"size"` // bytes
	Kind string `json:"kind"` // "cached", "write-combining", "uncached"
}

// Region is a row of the region table.
type Region struct {
	Name   string `json:"name"`
	Addr   uint64 `json:"addr"` // link address
	Size   uint64 `json:"size"` // bytes
	Access string `json:"access"`
	Across bool   `json:"across"` // reached across the bus
}

// Device is one virtio device, on either side of a link.
type Device struct {
	Name       string            `json:"name"` // "net0"
	Type       string            `json:"type"` // "net"
	Number     uint16            `json:"number"`
	Class      string            `json:"class,omitempty"` // "interactive"; "" where nothing is shared
	Interface  string            `json:"interface"`
	LinkType   string            `json:"link_type"` // "tap" or "tun"
	MAC        string            `json:"mac,omitempty"`
	MTU        int               `json:"mtu"`
	Carrier    bool              `json:"carrier"`
	Offload    string            `json:"offload"` // what the interface leaves to the other side
	Status     string            `json:"status"`  // device status bits
	Offered    []string          `json:"offered"`
	Allowed    []string          `json:"allowed"` // what the operator's mask leaves of it
	Negotiated []string          `json:"negotiated"`
	Pairs      int               `json:"queue_pairs"`     // queue pairs in use
	MaxPairs   int               `json:"max_queue_pairs"` // that the host offers, or the agent would use
	Queues     []Queue           `json:"queues"`
	Counters   map[string]uint64 `json:"counters"`
	LastError  string            `json:"last_error,omitempty"`
	// Notes say what the device goes without, and why, a line each.
	Notes []string `json:"notes,omitempty"`
}

// Queue is one virtqueue.
type Queue struct {
	Index    int               `json:"index"`
	Name     string            `json:"name"` // "rx0", "tx0": as the driver sees it
	Ready    bool              `json:"ready"`
	Size     uint16            `json:"size"`
	Avail    uint16            `json:"avail"`              // next available index
	Used     uint16            `json:"used"`               // next used index
	Ring     map[string]uint64 `json:"ring,omitempty"`     // of the virtqueue
	Pump     map[string]uint64 `json:"pump,omitempty"`     // of the loop that moves frames
	Doorbell map[string]uint64 `json:"doorbell,omitempty"` // of the bell that the loop sleeps on
	DMA      map[string]uint64 `json:"dma,omitempty"`      // of the board's engine and the processor behind it, where there is one
	// Bus is what this side's accesses across the bus for this queue come to, BusPerPacket the same for each frame that the loop
	// has moved; nil where they are not counted. Link.Bus includes them.
	Bus          *Bus         `json:"bus,omitempty"`
	BusPerPacket *BusPerFrame `json:"bus_per_packet,omitempty"`
}

// Counters returns the uint64 fields of the struct v under their names, in snake case.
func Counters(v interface{}) map[string]uint64 {
	rv := reflect.ValueOf(v)
	m := make(map[string]uint64)
	for i := 0; i < rv.NumField(); i++ {
		f := rv.Type().Field(i)
		if f.PkgPath == "" && rv.Field(i).Kind() == reflect.Uint64 {
			m[Snake(f.Name)] = rv.Field(i).Uint()
		}
	}
	return m
}

// Snake turns a Go name into snake case: "ReadBytes" into "read_bytes", "FIFOFull" into "fifo_full".
func Snake(name string) string {
	rs := []rune(name)
	var out []rune
	for i, r := range rs {
		if unicode.IsUpper(r) && i > 0 && (unicode.IsLower(rs[i-1]) || i+1 < len(rs) && unicode.IsLower(rs[i+1])) {
			out = append(out, '_')
		}
		out = append(out, unicode.ToLower(r))
	}
	return string(out)
}
