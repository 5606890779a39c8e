//go:build linux

package trial_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/trial/traffic"
)

// oldCommit is the last commit before device models and drivers became rooms of their own: its program speaks
// version 1.0 of docs/wire.md as this one does.
const oldCommit = "f858f6eb407a78e7b1c34337c56b7bbf19349de4"

// buildOld builds the program of oldCommit from this repository's history.
func buildOld(t *testing.T) string {
	t.Helper()
	git := func(args ...string) ([]byte, error) {
		var out, errs bytes.Buffer
		cmd := exec.CommandContext(t.Context(), "git", append([]string{"-c", "safe.directory=*"}, args...)...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			return nil, errors.New(strings.TrimSpace(errs.String() + " " + err.Error()))
		}
		return out.Bytes(), nil
	}
	root, err := git("rev-parse", "--show-toplevel")
	var tree []byte
	if err == nil {
		tree, err = git("-C", strings.TrimSpace(string(root)), "archive", oldCommit)
	}
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("needs git, and a checkout with its history (commit %.10s): %v", oldCommit, err)
		}
		t.Skipf("needs git, and a checkout with its history (commit %.10s): %v", oldCommit, err)
	}
	dir := t.TempDir()
	tar := exec.CommandContext(t.Context(), "tar", "-x", "-C", dir)
	tar.Stdin = bytes.NewReader(tree)
	if out, err := tar.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	exe := filepath.Join(dir, "old-boardlink")
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", exe, "./cmd/boardlink")
	build.Dir = dir
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build of commit %.10s: %v\n%s", oldCommit, err, out)
	}
	return exe
}

// TestOldProgram links this program with that of an earlier commit, as either end: the wire is the same.
func TestOldProgram(t *testing.T) {
	netnstest.Need(t)
	old := buildOld(t)
	for _, side := range []board.Side{board.Host, board.Agent} {
		command := [2][]string{board.Host: {exe, "host"}, board.Agent: {exe, "agent"}}
		command[side] = []string{old, side.String()}
		for _, c := range []trial.Config{
			{Link: "tap", Offload: true, MTU: 1500},
			{Link: "tap", Offload: true, MTU: 1500, Placement: "window", AgentArgs: []string{"--ring", "packed"}, Queues: 2},
			{Link: "tun", MTU: 9000, Memory: "uncached", Vectors: 1},
		} {
			t.Run("old "+side.String()+" "+c.Link+c.Placement, func(t *testing.T) {
				t.Parallel()
				c.Exe, c.Command = exe, command
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				res, err := trial.Run(ctx, c, traffic.RunConfig{Duration: 100 * time.Millisecond,
					Ping: traffic.PingConfig{Count: 20, Interval: 2 * time.Millisecond}})
				if err != nil {
					t.Fatal(err)
				}
				if !res.OK() || res.TCPGbps.BoardToHost == 0 || res.TCPGbps.HostToBoard == 0 {
					t.Errorf("%+v", res)
				}
			})
		}
		t.Run("old "+side.String()+" restarts", func(t *testing.T) {
			t.Parallel()
			r := start(t, trial.Config{Link: "tap", Offload: true, Command: command})
			waitUp(t, r)
			for _, s := range []board.Side{board.Host, board.Agent, board.Host, board.Agent} {
				if err := r.Kill(s); err != nil {
					t.Fatal(err)
				}
				if err := r.StartSide(s); err != nil {
					t.Fatal(err)
				}
				waitUp(t, r)
			}
		})
	}
}
