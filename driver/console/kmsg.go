package console

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/tty"
)

// kmsgPath is the device that the kernel's log is read from, a record with each read.
const kmsgPath = "/dev/kmsg"

// maxRecord is the longest record that the kernel gives, in bytes (PRINTK_MESSAGE_MAX; 8 KiB before Linux 6.6).
const maxRecord = 8 << 10

// Kmsg is an End: the kernel's log, from its first record that is kept. What is typed is dropped.
type Kmsg struct {
	records, lost uint64 // with sync/atomic; first: 64-bit alignment

	f     *os.File
	line  []byte // what is left of a record
	next  uint64 // number of the record that is to come next
	known bool   // next is
	buf   [maxRecord]byte
}

// OpenKmsg opens the kernel's log.
func OpenKmsg() (*Kmsg, error) {
	f, err := os.OpenFile(kmsgPath, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("the kernel's log: %w (it takes CAP_SYSLOG where kernel.dmesg_restrict is set)", err)
	}
	return &Kmsg{f: f}, nil
}

// Read implements End.
func (k *Kmsg) Read(b []byte) (int, error) {
	for len(k.line) == 0 {
		n, err := k.f.Read(k.buf[:])
		switch {
		case errors.Is(err, unix.EPIPE): // records were overwritten: the next one tells by its number how many
			continue
		case errors.Is(err, os.ErrClosed):
			return 0, errClosed
		case err != nil:
			return 0, fmt.Errorf("the kernel's log: %w", err)
		case n == 0:
			return 0, errClosed
		}
		k.line = k.text(k.buf[:n])
	}
	n := copy(b, k.line)
	k.line = k.line[n:]
	return n, nil
}

// text returns a record as lines of a terminal: "[    5.140900] text". A record is "6,339,5140900,-;text\n", then lines that begin with a space, of
// which each is a property (Documentation/ABI/testing/dev-kmsg). One that is malformed is passed on as it is.
func (k *Kmsg) text(rec []byte) []byte {
	atomic.AddUint64(&k.records, 1)
	semi := bytes.IndexByte(rec, ';')
	if semi < 0 {
		return rec
	}
	head, body := bytes.Split(rec[:semi], []byte(",")), rec[semi+1:]
	if i := bytes.IndexByte(body, '\n'); i >= 0 {
		body = body[:i]
	}
	if len(head) < 3 {
		return rec
	}
	seq, err := strconv.ParseUint(string(head[1]), 10, 64)
	us, err2 := strconv.ParseUint(string(head[2]), 10, 64)
	if err != nil || err2 != nil {
		return rec
	}
	var out []byte
	if k.known && seq > k.next {
		atomic.AddUint64(&k.lost, seq-k.next)
		out = append(out, fmt.Sprintf("[boardlink: the kernel has overwritten %d records]\r\n", seq-k.next)...)
	}
	k.next, k.known = seq+1, true
	out = append(out, fmt.Sprintf("[%5d.%06d] ", us/1e6, us%1e6)...)
	return append(append(out, body...), '\r', '\n')
}

// Write implements End: the kernel's log takes nothing.
func (k *Kmsg) Write([]byte) (int, error) { return 0, nil }

// Resize implements End.
func (k *Kmsg) Resize(tty.Size) {}

// Keeps implements End: the kernel keeps its log.
func (k *Kmsg) Keeps() bool { return true }

// Joined implements End.
func (k *Kmsg) Joined() string { return kmsgPath }

// State implements End.
func (k *Kmsg) State() (string, map[string]uint64) {
	return "", map[string]uint64{"records": atomic.LoadUint64(&k.records), "records_lost": atomic.LoadUint64(&k.lost)}
}

// Close implements End.
func (k *Kmsg) Close() error { return k.f.Close() }
