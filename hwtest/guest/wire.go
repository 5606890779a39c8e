// Package guest is what a test and the first process of its virtual machine have to agree on: the
// frames they exchange over a virtio-serial port, and the file in the initramfs that tells
// the first process what to load.
//
// In the room: the frames and their codec. Never in it: QEMU (hwtest/vm), what the first process does
// (hwtest/guest/init).
package guest

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

const (
	// Port is the name of the virtio-serial port that carries the frames.
	Port = "boardlink"
	// ConfigPath is where the initramfs holds the Config, as JSON.
	ConfigPath = "/etc/boardlink.json"
	// MaxHeader bounds a frame's header, in bytes.
	MaxHeader = 1 << 20
	// MaxData bounds a frame's data, in bytes. Longer contents go as several frames.
	MaxData = 1 << 20
)

// Config is what the first process does before the first frame.
type Config struct {
	// Modules are loaded in this order: dependencies stand before what needs them.
	Modules []Module `json:"modules"`
	// Seed goes to the kernel's random number generator, which would wait for noise that an emulated
	// machine makes little of.
	Seed []byte `json:"seed"`
}

// Module is a kernel module in the initramfs.
type Module struct {
	Name string `json:"name"`
	Path string `json:"path"`
	// Params is the module's command line, such as "enable_unsafe_noiommu_mode=1".
	Params string `json:"params,omitempty"`
}

// Operations of a frame to the guest.
const (
	OpStart    = "start"    // run Args; answered by EvStarted, then EvOutput ..., then EvExit
	OpSignal   = "signal"   // send Signal to process (or with Group to the process group) of ID's start
	OpStdin    = "stdin"    // Data goes to standard input of ID's start; EOF closes it
	OpPut      = "put"      // Data goes to the file Path, behind what is there with Append
	OpGet      = "get"      // answered by EvData ..., then EvDone
	OpGlob     = "glob"     // answered by EvDone with Names: the paths that match Path (Go's path/filepath.Glob)
	OpReadlink = "readlink" // answered by EvDone with Names: where the symbolic link Path leads to
	OpLoad     = "load"     // load the module Path with Params
	OpUnload   = "unload"   // unload the module Path
	OpPowerOff = "poweroff" // the machine ends
)

// Events of a frame from the guest.
const (
	EvHello   = "hello"   // the first frame
	EvStarted = "started" // Pid is valid
	EvOutput  = "output"  // Data is output of ID's start, to Stream
	EvExit    = "exit"    // Code or Signal is valid
	EvData    = "data"    // Data is the next part of ID's file
	EvDone    = "done"    // ID's request was carried out
	EvError   = "error"   // ID's request failed: Error
	EvKernel  = "kernel"  // a line of the kernel's log: Text, Level
)

// Frame is the header of one message either way. ID is chosen by the test and names the request in
// all its answers.
type Frame struct {
	ID uint64 `json:"id,omitempty"`
	Op string `json:"op"`

	Args   []string `json:"args,omitempty"`
	Env    []string `json:"env,omitempty"`
	Dir    string   `json:"dir,omitempty"`
	Stdin  bool     `json:"stdin,omitempty"` // OpStart: OpStdin will follow; else it is empty
	EOF    bool     `json:"eof,omitempty"`
	Signal int      `json:"signal,omitempty"` // its number on Linux
	Group  bool     `json:"group,omitempty"`
	Path   string   `json:"path,omitempty"`
	Mode   uint32   `json:"mode,omitempty"` // permissions
	Append bool     `json:"append,omitempty"`
	Params string   `json:"params,omitempty"`

	Pid    int      `json:"pid,omitempty"`
	Stream int      `json:"stream,omitempty"` // 1 standard output, 2 standard error
	Code   int      `json:"code,omitempty"`
	Error  string   `json:"error,omitempty"`
	Text   string   `json:"text,omitempty"`
	Level  int      `json:"level,omitempty"` // 0 emergency to 7 debug, as syslog(2)
	Kernel string   `json:"kernel,omitempty"`
	Failed []string `json:"failed,omitempty"` // EvHello: what went wrong before
	Names  []string `json:"names,omitempty"`

	Data []byte `json:"-"`
}

// Write sends f: its header's and its data's lengths as little-endian 32-bit numbers, the header as JSON, the
// data. One call of w.Write, so that writers need a lock only around Write.
func Write(w io.Writer, f *Frame) error {
	if len(f.Data) > MaxData {
		return fmt.Errorf("frame %s: %d bytes of data, at most %d go in one", f.Op, len(f.Data), MaxData)
	}
	h, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("frame %s: %w", f.Op, err)
	}
	if len(h) > MaxHeader {
		return fmt.Errorf("frame %s: a header of %d bytes, at most %d go in one", f.Op, len(h), MaxHeader)
	}
	b := make([]byte, 8, 8+len(h)+len(f.Data))
	binary.LittleEndian.PutUint32(b, uint32(len(h)))
	binary.LittleEndian.PutUint32(b[4:], uint32(len(f.Data)))
	b = append(append(b, h...), f.Data...)
	_, err = w.Write(b)
	return err
}

// Read receives a frame. The error is io.EOF where the stream ends between frames.
func Read(r io.Reader) (*Frame, error) {
	var l [8]byte
	if _, err := io.ReadFull(r, l[:]); err != nil {
		return nil, err
	}
	h, d := binary.LittleEndian.Uint32(l[:]), binary.LittleEndian.Uint32(l[4:])
	if h > MaxHeader || d > MaxData {
		return nil, fmt.Errorf("frame: a header of %d and data of %d bytes: out of step", h, d)
	}
	b := make([]byte, int(h)+int(d))
	if _, err := io.ReadFull(r, b); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	f := &Frame{}
	if err := json.Unmarshal(b[:h], f); err != nil {
		return nil, fmt.Errorf("frame: %w", err)
	}
	f.Data = b[h:]
	return f, nil
}
