package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestVhostUserNetFlags: the flags of QEMU's conventions for back ends become those of a host; what is wrong is told.
func TestVhostUserNetFlags(t *testing.T) {
	for _, c := range []struct {
		args  string
		want  []string
		print bool
		err   string
	}{
		{args: "--socket-path=/run/x", want: []string{"--board", "vhost-user:/run/x"}},
		{args: "--socket-path /run/x -i bl0 --addr=10.1.0.1/24", want: []string{"--board", "vhost-user:/run/x", "-i", "bl0", "--addr=10.1.0.1/24"}},
		{args: "--socket-path=fd=3", want: []string{"--board", "vhost-user:./fd=3"}},
		{args: "--mtu 9000 --fd=3", want: []string{"--board", "vhost-user:fd=3", "--mtu", "9000"}},
		{args: "--print-capabilities", print: true},
		{args: "--print-capabilities --fd=3", print: true},
		{args: "", err: "--socket-path=PATH or --fd=N"},
		{args: "--fd", err: "a value is missing"},
		{args: "--fd=x", err: "--fd x"},
		{args: "--fd=-1", err: "--fd -1"},
		{args: "--fd=3 --socket-path=/x", err: "given once"},
		{args: "--socket-path=", err: "a path"},
		{args: "--socket-path=/a,client", err: "without commas"},
		{args: "--socket-path=/a --board loopback:/b", err: "--board: not here"},
	} {
		got, print, err := hostArgs(strings.Fields(c.args))
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: error %v, want %q", c.args, err, c.err)
			}
			continue
		}
		if err != nil || print != c.print || !cmp.Equal(got, c.want) {
			t.Errorf("%q: %q, %v, %v, want %q", c.args, got, print, err, c.want)
		}
	}
}

// TestVhostUserNetCapabilities: what is printed is the JSON of the conventions, and the exit status 0.
func TestVhostUserNetCapabilities(t *testing.T) {
	var out, errOut bytes.Buffer
	if code := run([]string{"vhost-user-net", "--print-capabilities"}, &out, &errOut); code != 0 || errOut.Len() != 0 {
		t.Fatalf("exit status %d, %s", code, &errOut)
	}
	var caps struct{ Type string }
	if err := json.Unmarshal(out.Bytes(), &caps); err != nil || caps.Type != "net" {
		t.Errorf("%s: %v", &out, err)
	}
	out.Reset()
	if code := run([]string{"vhost-user-net", "--fd=3", "--socket-path=/x"}, &out, &errOut); code != exitUsage || strings.Count(errOut.String(), "\n") != 1 {
		t.Errorf("exit status %d, %s", code, &errOut)
	}
}
