package trial_test

import (
	"bytes"
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/disk"
)

var diskRounds = flag.Int("disk-rounds", 3, "how often TestDisk kills the host in the middle of writes")

// image makes an image of zeros.
func image(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// diskOf returns the status of the disk of a side.
func diskOf(t testing.TB, r *trial.Rig, s board.Side) (found status.Device) {
	t.Helper()
	for _, d := range getStatus(t, r, s).Links[0].Devices {
		if d.Type == "block" {
			found = d
		}
	}
	return found
}

// The host is killed again and again while blocks are written and read: no acknowledged write is lost, no read is stale, and the client sees no
// error. What it wrote is in the image at the end.
func TestDisk(t *testing.T) {
	img := image(t, 8<<20)
	sock := filepath.Join(t.TempDir(), "export")
	r := start(t, trial.Config{HostArgs: []string{"--disk", "name=root,file=" + img}, AgentArgs: []string{"--disk", "name=root,export=" + sock}})
	k, err := disk.New(disk.Config{Path: sock, Export: "root"})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	more := func(n uint64) {
		t.Helper()
		for from, begin := k.Requests(), time.Now(); k.Requests() < from+n; time.Sleep(time.Millisecond) {
			select {
			case err := <-done:
				t.Fatalf("the client ends: %v", err)
			default:
			}
			if time.Since(begin) > 30*time.Second {
				t.Fatalf("no more than %d requests: %v", k.Requests()-from, diskOf(t, r, board.Agent).Counters)
			}
		}
	}
	for i := 0; i < *diskRounds; i++ {
		more(uint64(50 + 37*i%200)) // never at the same place
		if err := r.Kill(board.Host); err != nil {
			t.Fatal(err)
		}
		if err := r.StartSide(board.Host); err != nil {
			t.Fatal(err)
		}
	}
	more(200)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := k.Verify(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := k.VerifyBy(func(b []byte, off uint64) error { _, err := f.ReadAt(b, int64(off)); return err }); err != nil {
		t.Fatal(err)
	}
	if res := k.Result(); res.Wrong != 0 || res.Writes == 0 || res.Reads == 0 {
		t.Errorf("%+v", res)
	}
	a := diskOf(t, r, board.Agent)
	if a.Counters["resent"] == 0 || a.Counters["errors"] != 0 || a.Counters["broken"] != 0 || a.Counters["export_broken"] != 0 || a.Counters["ups"] != uint64(*diskRounds+1) {
		t.Errorf("agent: %v", a.Counters)
	}
	if a.Counters["size_bytes"] != 8<<20 || a.Number != 128 || a.Interface != sock || a.Status != "ACKNOWLEDGE|DRIVER|FEATURES_OK|DRIVER_OK" {
		t.Errorf("agent: %+v", a)
	}
	t.Logf("%+v; %v", k.Result(), a.Counters)
}

// fio writes the disk at random and in order, 1 to 32 requests deep, and finds the check sum of each block when it reads it back, with a kill of the host in
// the middle of each run.
func TestDiskFIO(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		const why = "fio is missing (Debian: apt-get install fio)"
		if os.Getenv("CI") == "true" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	img := image(t, 8<<20)
	sock := filepath.Join(t.TempDir(), "export")
	r := start(t, trial.Config{HostArgs: []string{"--disk", "name=root,queues=2,file=" + img}, AgentArgs: []string{"--disk", "name=root,queues=2,export=" + sock}})
	for _, c := range []struct{ rw, size, depth string }{{"randwrite", "4k-4k", "32"}, {"write", "64k-64k", "4"}, {"randwrite", "4k-64k", "1"}} {
		from := diskOf(t, r, board.Agent).Counters["writes"]
		cmd := exec.Command("fio", "--name=verify", "--thread", "--ioengine=nbd", "--uri=nbd+unix:///root?socket="+sock, "--rw="+c.rw, "--bsrange="+c.size, "--iodepth="+c.depth, "--size=8M",
			"--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--end_fsync=1")
		cmd.Dir = t.TempDir() // for the state of what it verifies
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		for diskOf(t, r, board.Agent).Counters["writes"] < from+20 {
			select {
			case ended := <-done:
				t.Fatalf("fio %+v ends before it has written: %v\n%s", c, ended, &out)
			case <-time.After(time.Millisecond):
			}
		}
		if err := r.Kill(board.Host); err != nil {
			t.Error(err)
		}
		if err := r.StartSide(board.Host); err != nil {
			t.Error(err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("fio %+v: %v\n%s", c, err, &out)
			}
		case <-time.After(60 * time.Second):
			cmd.Process.Kill()
			t.Fatalf("fio %+v does not end: %v", c, diskOf(t, r, board.Agent).Counters)
		}
	}
	a := diskOf(t, r, board.Agent)
	if a.Counters["errors"] != 0 || a.Counters["broken"] != 0 || a.Counters["writes"] == 0 || a.Counters["reads"] == 0 || a.Counters["ups"] != 4 || len(a.Queues) != 2 {
		t.Errorf("agent: %v, %d queues", a.Counters, len(a.Queues))
	}
}
