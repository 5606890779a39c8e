package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestNonsense: every command, with flags, paths and specs that make no sense: one line that names what is wrong, exit
// status 2, nothing on standard output.
func TestNonsense(t *testing.T) {
	b := newBox(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("[host.window]\nbar = 7\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var cases []string
	every := []string{"host", "agent", "serve", "loopback", "status", "probe", "check", "doctor", "version",
		"bench dma", "bench ring", "bench doorbell", "bench packets", "bench net", "bench disk", "bench all"}
	for _, c := range every {
		cases = append(cases, c+" --bogus", c+" --bogus=1", c+" -Z")
	}
	cases = append(cases, "bogus", "bench", "bench bogus", "host host", "agent extra", "loopback extra", "probe extra", "version extra")
	// Ends: each flag with an empty value, a word, and a number out of bounds.
	for _, side := range []string{"host", "agent"} {
		e := side + " --status none --board loopback:$D/none "
		for _, f := range []string{"name", "interface", "addr", "mtu", "mac", "deny", "net", "machine-id", "busy-poll", "cpu", "memory", "beat", "lost", "status", "link", "queues"} {
			cases = append(cases, e+"--"+f+" ''", e+"--"+f)
		}
		for _, f := range []string{"addr", "mtu", "mac", "deny", "net", "busy-poll", "cpu", "memory", "beat", "lost", "link", "queues", "offload=maybe", "persist=maybe", "no-offload=true"} {
			if strings.Contains(f, "=") {
				cases = append(cases, e+"--"+f)
			} else {
				cases = append(cases, e+"--"+f+" nonsense")
			}
		}
		cases = append(cases, e+"--mtu 0", e+"--mtu -1", e+"--mtu 67", e+"--mtu 70000", e+"--queues 0", e+"--queues -1", e+"--queues 17", e+"-i ''", e+"-i a/b --no-such",
			e+"--net name=a -i b", e+"--net name=a --addr 10.0.0.1/24", e+"--net name=a --mac 02:00:00:00:00:01", e+"--net name=", e+"--net name=a,mtu=0", e+"--net name=a,queues=0", e+"--net name=a,board=1",
			e+"--net name=a,board=x", e+"--net ,", e+"--beat 0", e+"--beat 1h", e+"--lost 0", e+"--deny version_1", e+"--deny raw_ip", e+"--link tun --mac 02:00:00:00:00:01",
			side+" --board loopback", side+" --board :x", side+" --board nokind:x", side+" --board loopback: --status none", side+" --board loopback:fd=x --status none",
			side+" --board ivshmem:nonsense --status none", side+" --board mpc83xx:nonsense --status none", side+" --board generic:$D/none --status none", side+" --board generic:$F --status none")
	}
	e := "agent --status none --board loopback:$D/none "
	cases = append(cases, e+"--queue-size 0", e+"--queue-size 3", e+"--queue-size x", e+"--placement moon", e+"--ring round", e+"--ring packed --placement push", e+"--rx-buffer 0", e+"--rx-buffer x",
		e+"--queue-max 64", e+"--board-mac 02:00:00:00:00:01", e+"--board loopback:$D/other", e+"--net name=a,board-mac=02:00:00:00:00:01")
	e = "host --status none --board loopback:$D/none "
	cases = append(cases, e+"--queue-max 0", e+"--queue-max 65536", e+"--dma maybe", e+"--dma-min -1", e+"--dma-min 4294967296", e+"--ring split", e+"--board loopback:$D/none",
		e+"--board loopback:$D/other -i a", e+"--board loopback:$D/other --net board=0", e+"--board-mac 01:00:00:00:00:00")
	cases = append(cases, "serve", "serve ''", "serve $D/none/s", "serve $D/s --size 0", "serve $D/s --size nonsense", "serve $D/s --size 3M", "serve $D/s --vectors 0", "serve $D/s --vectors x", "serve $D/s --mode 999", "serve $F",
		"loopback --duration 0", "loopback --duration x", "loopback --mtu 0", "loopback --mtu x", "loopback --queues 0", "loopback --nets 0", "loopback --devices x", "loopback --window 0", "loopback --window x", "loopback --memory tape",
		"loopback --busy-poll x", "loopback --cpu x,y", "loopback --placement moon", "loopback --ring round", "loopback --link tub",
		"doctor", "doctor ''", "doctor nonsense", "doctor nokind:x", "doctor loopback:", "doctor loopback:/nope", "doctor loopback:$F", "doctor generic:$F", "doctor generic:$F@0000:00:00.0", "doctor generic:$D/none",
		"doctor ivshmem:x", "doctor mpc83xx:x", "doctor ivshmem:0000:ff:1f.7",
		"bench dma", "bench dma nokind:x", "bench dma loopback:/nope", "bench dma loopback --max-size x", "bench dma loopback --max-size 1G", "bench dma loopback --duration 0", "bench dma loopback --duration x", "bench dma loopback --offset 3",
		"bench dma loopback --plot /nonexistent/x.svg", "bench dma loopback --save /nonexistent/x.json", "bench dma generic:$F@0000:00:00.0", "bench dma ivshmem:0000:ff:1f.7",
		"bench disk --size 1K", "bench disk --size x", "bench disk --duration 0", "bench disk --rounds 0", "bench disk --paths tape", "bench disk --only ^x", "bench disk --only (", "bench disk --also file", "bench disk --window 3M",
		"bench doorbell loopback:/nope", "bench doorbell nokind:x", "bench doorbell generic:$F@0000:00:00.0",
		"check", "check --sample none", "check $F --sample polled")
	for _, c := range cases {
		var args []string
		for _, a := range strings.Fields(c) {
			if a == "''" {
				a = ""
			}
			args = append(args, strings.NewReplacer("$D", dir, "$F", file).Replace(a))
		}
		var st int
		var out, errs string
		if strings.Contains(c, " --board ") && strings.Contains(c, "--status none") && !strings.Contains(c, "$D/none ") {
			st, out, errs = b.run("", args...) // it may get as far as to make an interface
		} else {
			done := make(chan struct{})
			go func() {
				defer close(done)
				st, out, errs = inTest(args...)
			}()
			select {
			case <-done:
			case <-time.After(5 * time.Second):
				t.Errorf("%s: goes on", c)
				continue
			}
		}
		if st != exitUsage {
			t.Errorf("%s: status %d: %s", c, st, errs)
		}
		line := strings.TrimSuffix(errs, "\n")
		if line == "" || strings.Contains(line, "\n") || !strings.HasPrefix(line, "boardlink") || len(line) > 400+len(dir) {
			t.Errorf("%s: standard error is not one line: %q", c, errs)
		}
		if out != "" {
			t.Errorf("%s: standard output: %q", c, out)
		}
		for _, raw := range []string{"strconv.", "netip.", "panic", "%!", "goroutine"} {
			if strings.Contains(line, raw) {
				t.Errorf("%s: %q in the line: %s", c, raw, line)
			}
		}
	}
}
