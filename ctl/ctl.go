// Package ctl is what is said on a program's control socket, which is its status socket too: one JSON object a line. A client
// sends a Request and an empty line, the program a Reply. What follows depends on the verb; for VerbConsole it is Messages, each with
// as many bytes behind its line as it says.
//
// It must not know what a verb does, nor where the socket is.
package ctl

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
)

// Version is that of requests and replies. Fields that a reader does not know are to be ignored, so it changes only where
// that is wrong.
const Version = 1

// VerbConsole attaches a terminal to a console.
const VerbConsole = "console"

// Request is what a client asks for.
type Request struct {
	Boardlink int             `json:"boardlink"` // Version
	Verb      string          `json:"verb"`
	Console   *ConsoleRequest `json:"console,omitempty"` // of VerbConsole
}

// ConsoleRequest says how a terminal is attached.
type ConsoleRequest struct {
	Link     string `json:"link,omitempty"` // "": any that has a console of that name
	Name     string `json:"name"`
	Who      string `json:"who,omitempty"` // for others to read
	ReadOnly bool   `json:"read_only,omitempty"`
	TakeOver bool   `json:"take_over,omitempty"` // take the keyboard from who has it
	Back     int    `json:"back"`                // bytes that were printed before, to begin with; -1: all that are kept
	Size
}

// Size is that of a terminal in characters; 0: unknown.
type Size struct {
	Cols uint16 `json:"cols,omitempty"`
	Rows uint16 `json:"rows,omitempty"`
}

// Reply is a program's answer.
type Reply struct {
	Boardlink int    `json:"boardlink"`       // Version
	Error     string `json:"error,omitempty"` // "": what was asked for is done, or follows
	Kind      string `json:"kind,omitempty"`  // of the error: one of the Kinds
}

// Kinds of errors.
const (
	KindRequest  = "request"   // it is malformed, or of a later version
	KindVerb     = "verb"      // the program has no such verb
	KindNotFound = "not_found" // it has no console of that name, or several
	KindBusy     = "busy"      // too many at once
)

// Types of messages.
const (
	// Attached is the program's first: State is there, and Bytes is how many bytes of the scrollback come, none of
	// which follow it.
	Attached = "attached"
	// Output is what the board printed; Lost bytes are missing before it.
	Output = "output"
	// Changed tells that State is another one.
	Changed = "state"
	// Denied tells that what was typed was dropped: another terminal has the keyboard.
	Denied = "denied"
	// End is the program's last: the reason is Text, empty after Finish.
	End = "end"

	// Input is what was typed.
	Input = "input"
	// Resize tells the terminal's size.
	Resize = "size"
	// Take takes the keyboard from who has it.
	Take = "take"
	// Finish asks for End when the board has all that was typed.
	Finish = "finish"
)

// Message is what both sides say while a terminal is attached.
type Message struct {
	Type  string `json:"type"`
	Bytes int    `json:"bytes,omitempty"` // of Output and Input: they follow the line
	Lost  uint64 `json:"lost,omitempty"`
	State *State `json:"state,omitempty"`
	Text  string `json:"text,omitempty"`
	Size
}

// State is how things are with a console.
type State struct {
	Link      string   `json:"link"`
	Name      string   `json:"name"`
	Running   bool     `json:"running"`  // the board drives the console
	Keyboard  bool     `json:"keyboard"` // this terminal types
	Terminals []string `json:"terminals"`
}

const (
	maxLine  = 64 << 10
	maxBytes = 1 << 20
)

// Conn is one end of a connection. One goroutine receives, any number send.
type Conn struct {
	r   *bufio.Reader
	mu  sync.Mutex // serializes what is sent
	w   io.Writer
	buf []byte
}

// NewConn returns an end that reads from r, and writes to w.
func NewConn(r io.Reader, w io.Writer) *Conn {
	return &Conn{r: bufio.NewReaderSize(r, 32<<10), w: w}
}

// Send sends a message, with b behind it, of at most 1 MiB.
func (c *Conn) Send(m Message, b []byte) error {
	if len(b) > 0 {
		m.Bytes = len(b)
	}
	return c.send(m, b)
}

// SendLine sends a Request or a Reply.
func (c *Conn) SendLine(v interface{}) error { return c.send(v, nil) }

func (c *Conn) send(v interface{}, b []byte) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf = append(append(append(c.buf[:0], line...), '\n'), b...) // one system call
	_, err = c.w.Write(c.buf)
	return err
}

// errLine: a line is too long.
var errLine = errors.New("a line is too long")

// Receive returns the next message with the bytes behind it, which are valid until the next call if b is given to it.
func (c *Conn) Receive(b []byte) (Message, []byte, error) {
	var m Message
	if err := c.ReceiveLine(&m); err != nil {
		return m, nil, err
	}
	if m.Type == Attached {
		return m, nil, nil
	}
	if m.Bytes < 0 || m.Bytes > maxBytes {
		return m, nil, fmt.Errorf("a message with %d bytes: 0 to %d are possible", m.Bytes, maxBytes)
	}
	if cap(b) < m.Bytes {
		b = make([]byte, m.Bytes)
	}
	b = b[:m.Bytes]
	_, err := io.ReadFull(c.r, b)
	return m, b, err
}

// ReceiveLine reads one line into v: a Request or a Reply.
func (c *Conn) ReceiveLine(v interface{}) error {
	line, err := c.Line()
	if err != nil {
		return err
	}
	return Decode(line, v)
}

// Line returns the next line without its end.
func (c *Conn) Line() (string, error) {
	var line []byte
	for {
		part, err := c.r.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxLine {
			return "", errLine
		}
		if err == nil {
			return strings.TrimRight(string(line), "\r\n"), nil
		}
		if err != bufio.ErrBufferFull {
			return "", err
		}
	}
}

// Decode reads a line into v.
func Decode(line string, v interface{}) error {
	if err := json.Unmarshal([]byte(line), v); err != nil {
		return fmt.Errorf("%.60q is not what boardlink programs say: %w", line, err)
	}
	return nil
}
