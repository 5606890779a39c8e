//go:build linux

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	diskFiles = 8
	diskBytes = 128 << 10 // of each
	diskPiece = 16 << 10  // is written between two syncs
)

// contents returns what file i holds: other bytes for each seed.
func contents(i int, seed string) []byte {
	sum := sha256.Sum256([]byte(fmt.Sprintf("%s %d", seed, i)))
	x := binary.LittleEndian.Uint64(sum[:])
	var b []byte
	for len(b) < diskBytes {
		x = x*6364136223846793005 + 1442695040888963407
		b = binary.LittleEndian.AppendUint64(b, x)
	}
	return b
}

// disk mounts the ext4 file system on a device, writes files or verifies them, and unmounts it. All files are written at the same
// time, each piece is followed by a sync, so that requests of all kinds are under way together.
func disk(device, what, seed string) (err error) {
	const dir = "/mnt"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(device, dir, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", device, err)
	}
	defer func() {
		if uerr := unix.Unmount(dir, 0); err == nil && uerr != nil {
			err = fmt.Errorf("unmount: %w", uerr)
		}
	}()
	errs := make([]error, diskFiles)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Add(1)
		go func() {
			defer wg.Done()
			name, want := filepath.Join(dir, fmt.Sprintf("file%d", i)), contents(i, seed)
			if what == "write" {
				errs[i] = writeFile(name, want)
				return
			}
			got, err := os.ReadFile(name)
			if err == nil && !bytes.Equal(got, want) {
				err = fmt.Errorf("%s differs", name)
			}
			errs[i] = err
		}()
	}
	wg.Wait()
	for _, e := range errs {
		if e != nil {
			return e
		}
	}
	return nil
}

func writeFile(name string, b []byte) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for len(b) > 0 {
		n := min(len(b), diskPiece)
		if _, err := f.Write(b[:n]); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
