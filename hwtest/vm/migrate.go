package vm

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/boardlink/boardlink/hwtest/guest"
)

// Migration is how long a machine took to move.
type Migration struct {
	Total    time.Duration // from the command to the end
	Downtime time.Duration // of it, the machine stood still, as QEMU counts
	Bytes    int64         // of memory that were transferred
}

// Migrate moves the machine, while it runs, to another QEMU of this system, and returns that as a machine of its own. It
// has the given devices in place of those of the Config; its memory has to be the same. m stands still from then on,
// with the memory that it had; the caller closes both. Processes that Start returned go on in the guest, and count as ended. still,
// if not nil, is called when m stands still and the other one does not run yet. Nothing may
// use the machine meanwhile.
func (m *VM) Migrate(ctx context.Context, devices []string, still func(to *VM) error) (to *VM, r Migration, err error) {
	cfg := m.cfg
	cfg.Devices = devices
	m.mu.Lock()
	to = &VM{Name: m.Name, Kernel: m.Kernel, cfg: cfg, calls: map[uint64]chan *guest.Frame{}, nextID: m.nextID, console: newTail(256 << 10),
		hello: make(chan *guest.Frame, 1), done: make(chan struct{})}
	m.mu.Unlock()
	if to.dir, err = os.MkdirTemp("", "boardlink-vm-"); err != nil {
		return nil, r, err
	}
	// The guest has read its own long ago; QEMU wants one.
	initrd := filepath.Join(to.dir, "initrd")
	if err = os.WriteFile(initrd, make([]byte, 512), 0o600); err == nil {
		err = takeTurn(ctx)
	}
	if err != nil {
		os.RemoveAll(to.dir)
		return nil, r, err
	}
	to.more = []string{"-S", "-incoming", "defer"}
	if err = to.start(qemuBinary(cfg.arch()), initrd); err != nil {
		giveTurn()
		os.RemoveAll(to.dir)
		return nil, r, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w; the destination's console:\n%s", err, to.Console())
			to.Close()
			to = nil
		}
	}()
	uri := map[string]any{"uri": "unix:" + filepath.Join(to.dir, "migration")}
	if _, err = to.QMP(ctx, "migrate-incoming", uri); err != nil {
		return to, r, err
	}
	if _, err = m.QMP(ctx, "migrate", uri); err != nil {
		return to, r, err
	}
	if r, err = m.migrated(ctx); err != nil {
		return to, r, err
	}
	if err = to.wait(ctx, "paused"); err != nil {
		return to, r, err
	}
	if still != nil {
		if err = still(to); err != nil {
			return to, r, err
		}
	}
	_, err = to.QMP(ctx, "cont", nil)
	return to, r, err
}

// migrated waits for the end of the migration at its source.
func (m *VM) migrated(ctx context.Context) (r Migration, err error) {
	for {
		b, err := m.QMP(ctx, "query-migrate", nil)
		if err != nil {
			return r, err
		}
		var s struct {
			Status    string
			ErrorDesc string `json:"error-desc"`
			Total     int64  `json:"total-time"`
			Downtime  int64
			RAM       struct{ Transferred int64 }
		}
		if err := json.Unmarshal(b, &s); err != nil {
			return r, err
		}
		switch s.Status {
		case "completed":
			return Migration{time.Duration(s.Total) * time.Millisecond, time.Duration(s.Downtime) * time.Millisecond, s.RAM.Transferred}, nil
		case "failed", "cancelled":
			return r, fmt.Errorf("machine %s: the migration %s: %s", m.Name, s.Status, s.ErrorDesc)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return r, fmt.Errorf("machine %s: %w: the migration is %s: %s", m.Name, ErrTimeout, s.Status, b)
		}
	}
}

// wait waits until QEMU's state is the given one (QMP, query-status).
func (m *VM) wait(ctx context.Context, state string) error {
	for {
		b, err := m.QMP(ctx, "query-status", nil)
		if err != nil {
			return err
		}
		var s struct{ Status string }
		if err := json.Unmarshal(b, &s); err != nil || s.Status == state {
			return err
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("machine %s: %w: it is %s, not %s", m.Name, ErrTimeout, s.Status, state)
		}
	}
}
