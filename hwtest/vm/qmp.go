package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// qmp speaks to QEMU's monitor (QEMU, docs/interop/qmp-spec.txt): JSON, a line each.
type qmp struct {
	f *os.File

	mu     sync.Mutex
	nextID int
	calls  map[string]chan *qmpMessage
	events []QMPEvent
	more   chan struct{} // closed and replaced at each event
	dead   chan struct{}
}

type qmpMessage struct {
	Greeting *json.RawMessage `json:"QMP"`
	ID       string           `json:"id"`
	Return   json.RawMessage  `json:"return"`
	Error    *QMPError        `json:"error"`
	Event    string           `json:"event"`
	Data     json.RawMessage  `json:"data"`
}

// QMPEvent is an event of QEMU's monitor.
type QMPEvent struct {
	Name string
	Data json.RawMessage
}

// QMPError is QEMU's refusal of a command.
type QMPError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

// Error is QEMU's description.
func (e *QMPError) Error() string { return e.Desc }

func newQMP(f *os.File) *qmp {
	q := &qmp{f: f, calls: map[string]chan *qmpMessage{}, more: make(chan struct{}), dead: make(chan struct{})}
	go q.read()
	// Commands are taken only after this one.
	q.write("qmp_capabilities", nil, "caps")
	return q
}

func (q *qmp) close() { q.f.Close() }

// write sends a command, with the descriptors that go with it.
func (q *qmp) write(cmd string, args any, id string, fds ...int) error {
	m := map[string]any{"execute": cmd, "id": id}
	if args != nil {
		m["arguments"] = args
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	b = append(b, '\n')
	if len(fds) == 0 {
		_, err = q.f.Write(b)
		return err
	}
	raw, err := q.f.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Write(func(s uintptr) bool {
		sent = unix.Sendmsg(int(s), b, unix.UnixRights(fds...), nil, 0)
		return sent != unix.EAGAIN
	})
	return errors.Join(err, sent)
}

func (q *qmp) read() {
	defer close(q.dead)
	sc := bufio.NewScanner(q.f)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var m qmpMessage
		if json.Unmarshal(sc.Bytes(), &m) != nil {
			continue
		}
		q.mu.Lock()
		if m.Event != "" {
			q.events = append(q.events, QMPEvent{m.Event, m.Data})
			close(q.more)
			q.more = make(chan struct{})
		} else if c := q.calls[m.ID]; c != nil {
			delete(q.calls, m.ID)
			c <- &m
		}
		q.mu.Unlock()
	}
}

func (q *qmp) do(ctx context.Context, cmd string, args any, fds ...int) (json.RawMessage, error) {
	q.mu.Lock()
	q.nextID++
	id := fmt.Sprint(q.nextID)
	c := make(chan *qmpMessage, 1)
	q.calls[id] = c
	err := q.write(cmd, args, id, fds...)
	q.mu.Unlock()
	if err == nil {
		select {
		case m := <-c:
			if m.Error != nil {
				return nil, m.Error
			}
			return m.Return, nil
		case <-q.dead:
			err = errors.New("the monitor is gone")
		case <-ctx.Done():
			err = fmt.Errorf("%w: %w", ErrTimeout, ctx.Err())
		}
	}
	q.mu.Lock()
	delete(q.calls, id)
	q.mu.Unlock()
	return nil, err
}

// QMP runs a command of QEMU's monitor and returns its answer; args may be nil. The error is a QMPError
// where QEMU refuses it.
func (m *VM) QMP(ctx context.Context, cmd string, args map[string]any) (json.RawMessage, error) {
	var a any
	if args != nil {
		a = args
	}
	r, err := m.qmp.do(ctx, cmd, a)
	if err != nil {
		var refused *QMPError
		if e := m.Err(); e != nil && !errors.As(err, &refused) {
			return nil, e
		}
		return nil, fmt.Errorf("machine %s: QMP %s: %w", m.Name, cmd, err)
	}
	return r, nil
}

// Monitor runs a command of QEMU's human monitor, such as "info pci", and returns what it prints.
func (m *VM) Monitor(ctx context.Context, line string) (string, error) {
	r, err := m.QMP(ctx, "human-monitor-command", map[string]any{"command-line": line})
	if err != nil {
		return "", err
	}
	var s string
	return s, json.Unmarshal(r, &s)
}

// Events returns the monitor's events so far; their number is a mark for WaitEvent.
func (m *VM) Events() []QMPEvent {
	m.qmp.mu.Lock()
	defer m.qmp.mu.Unlock()
	return append([]QMPEvent(nil), m.qmp.events...)
}

// WaitEvent waits for an event of that name for which match, if not nil, returns true. The first skip events are
// not looked at.
func (m *VM) WaitEvent(ctx context.Context, skip int, name string, match func(json.RawMessage) bool) (QMPEvent, error) {
	for n := skip; ; {
		m.qmp.mu.Lock()
		events, more := m.qmp.events, m.qmp.more
		m.qmp.mu.Unlock()
		for ; n < len(events); n++ {
			if events[n].Name == name && (match == nil || match(events[n].Data)) {
				return events[n], nil
			}
		}
		select {
		case <-more:
		case <-m.done:
			return QMPEvent{}, m.Err()
		case <-ctx.Done():
			return QMPEvent{}, fmt.Errorf("machine %s: event %s: %w: %w", m.Name, name, ErrTimeout, ctx.Err())
		}
	}
}

// DeviceAdd plugs in a device, by QEMU's properties: "driver", "id", "bus" and others.
func (m *VM) DeviceAdd(ctx context.Context, props map[string]any) error {
	_, err := m.QMP(ctx, "device_add", props)
	return err
}

// DeviceDel pulls a device out and waits until it is gone: the guest has to let go of it.
func (m *VM) DeviceDel(ctx context.Context, id string) error {
	skip := len(m.Events())
	if _, err := m.QMP(ctx, "device_del", map[string]any{"id": id}); err != nil {
		return err
	}
	_, err := m.WaitEvent(ctx, skip, "DEVICE_DELETED", func(d json.RawMessage) bool {
		var e struct{ Device string }
		return json.Unmarshal(d, &e) == nil && e.Device == id
	})
	return err
}

// PlugIvshmem plugs an ivshmem function into a root port or a bus.
func (m *VM) PlugIvshmem(ctx context.Context, d Ivshmem) error {
	backend := map[string]any{"type": "socket", "data": map[string]any{
		"addr": map[string]any{"type": "unix", "data": map[string]any{"path": d.Socket}}, "server": false}}
	if _, err := m.QMP(ctx, "chardev-add", map[string]any{"id": d.chardev(), "backend": backend}); err != nil {
		return err
	}
	props := map[string]any{"driver": "ivshmem-doorbell", "id": d.ID, "chardev": d.chardev(), "vectors": d.vectors()}
	if b := d.bus(); b != "" {
		props["bus"] = b
	}
	if d.Addr != "" {
		props["addr"] = d.Addr
	}
	if err := m.DeviceAdd(ctx, props); err != nil {
		m.QMP(ctx, "chardev-remove", map[string]any{"id": d.chardev()})
		return err
	}
	return nil
}

// PullIvshmem pulls an ivshmem function out, so that PlugIvshmem can plug it in again.
func (m *VM) PullIvshmem(ctx context.Context, d Ivshmem) error {
	if err := m.DeviceDel(ctx, d.ID); err != nil {
		return err
	}
	if err := m.SettleIvshmem(ctx, d.vectors()); err != nil {
		return err
	}
	_, err := m.QMP(ctx, "chardev-remove", map[string]any{"id": d.chardev()})
	return err
}

// SettleIvshmem keeps QEMU alive after an ivshmem function with so many vectors was pulled out.
//
// QEMU 7.2 closes the device's eventfds but goes on polling their numbers, with a handler that uses
// the freed device: it corrupts its heap as soon as something else is opened under such a number, for
// instance when the device is plugged in again. So these numbers are given to idle eventfds, for good.
func (m *VM) SettleIvshmem(ctx context.Context, vectors int) error {
	for range vectors*maxPeers + 8 {
		if err := m.qmp.occupy(ctx); err != nil {
			return fmt.Errorf("machine %s: QMP getfd: %w", m.Name, err)
		}
	}
	return nil
}

// maxPeers is how many clients of an ivshmem server a test is taken to have.
const maxPeers = 8

// occupy makes QEMU hold an eventfd that never becomes readable.
func (q *qmp) occupy(ctx context.Context) error {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = q.do(ctx, "getfd", map[string]any{"fdname": fmt.Sprintf("idle%d", idle.Add(1))}, fd)
	return err
}

var idle atomic.Int64
