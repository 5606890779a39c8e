package trial_test

import (
	"context"
	"flag"
	"os"
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
