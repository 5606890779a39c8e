//go:build linux

package hwtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"golang.org/x/sys/unix"
)

// doors is a host with two vhost-user sockets, in a namespace of its own.
type doors struct {
	end
	cmd  *exec.Cmd
	args []string
}

func (d *doors) start() {
	d.t.Helper()
	exe, err := programPath()
	if err != nil {
		d.t.Fatal(err)
	}
	d.cmd = exec.Command(exe, d.args...)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.ns.Start(d.cmd); err != nil {
		d.t.Fatal(err)
	}
}

// connected waits until the driver of door n runs.
func (d *doors) connected(n, pairs int) status.Link {
	d.t.Helper()
	return d.waitState(n, "connected, with carrier", 60*time.Second, func(l status.Link) bool {
		return l.State == "connected" && len(l.Devices) == 1 && l.Devices[0].Carrier && l.Devices[0].Pairs == pairs
	})
}

// newDoors starts a host in a namespace of its own, which ends with the test; args follow those
// that all have.
func newDoors(t *testing.T, dir string, args ...string) *doors {
	t.Helper()
	if netns.NeedsUser() {
		vmtest.Lacks(t, "root (CAP_NET_ADMIN, CAP_SYS_ADMIN)")
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return newDoorsIn(t, ns, dir, args...)
}

// newDoorsIn starts a host in a namespace; dir is for its status socket.
func newDoorsIn(t *testing.T, ns *netns.NS, dir string, args ...string) *doors {
	t.Helper()
	d := &doors{end: end{t: t, side: "host", ns: ns, socket: filepath.Join(dir, "status"), log: new(logBuffer)}}
	d.args = append([]string{"host", "--status", d.socket}, args...)
	d.logOnFailure()
	d.start()
	t.Cleanup(func() {
		d.cmd.Process.Signal(unix.SIGTERM)
		if err := d.cmd.Wait(); err != nil {
			t.Errorf("the host ended badly: %v", err)
		}
	})
	return d
}

// listening waits until door n has no front end.
func (d *doors) listening(n int) status.Link {
	d.t.Helper()
	return d.waitState(n, "listening, without carrier", 20*time.Second, func(l status.Link) bool {
		return l.State == "waiting for a front end" && !l.Devices[0].Carrier
	})
}

// shortDir makes a folder for sockets, whose paths have 107 bytes.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func has(names []string, name string) bool {
	for _, n := range names {
		if n == name {
			return true
		}
	}
	return false
}
