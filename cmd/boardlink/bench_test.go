package main

import (
	"encoding/json"
	"encoding/xml"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/virtiomsg"
)

// TestBenchDMA: the figures that scripts read, the table, and the plot.
func TestBenchDMA(t *testing.T) {
	b := newBox(t)
	plot := filepath.Join(t.TempDir(), "x.svg")
	st, out, errs := b.run("", "bench", "dma", "loopback", "--json", "--duration", "500us", "--max-size", "64K", "--plot", plot)
	if st != 0 || errs != "" {
		t.Fatalf("status %d: %s\n%s", st, errs, out)
	}
	var v any
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	for _, name := range []string{"device_copy_ratio_64k.host_to_board", "device_copy_ratio_64k.board_to_host", "seconds", "environment.machine_cpus"} {
		if number(t, v, name) <= 0 {
			t.Errorf("%s is not above 0", name)
		}
	}
	if number(t, v, "corrupt") != 0 {
		t.Error("corrupt copies")
	}
	points, _ := v.(map[string]any)["points"].([]any)
	if len(points) == 0 {
		t.Fatal("no points")
	}
	for _, name := range []string{"size", "in_flight", "mbps", "p50_us", "p99_us", "cpu", "copies"} {
		if number(t, points[0], name) <= 0 {
			t.Errorf("%s of the first point is not above 0", name)
		}
	}
	svg, err := os.ReadFile(plot)
	if err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(strings.NewReader(string(svg)))
	for err = nil; err == nil; _, err = d.Token() {
	}
	ways := map[[2]any]bool{}
	for _, p := range points {
		ways[[2]any{p.(map[string]any)["variant"], p.(map[string]any)["direction"]}] = true
	}
	if err != io.EOF || len(ways) < 8 || strings.Count(string(svg), "<polyline") != len(ways) {
		t.Errorf("the plot: %v, %d lines", err, strings.Count(string(svg), "<polyline"))
	}

	st, out, errs = b.run("", "bench", "dma", "loopback", "--duration", "100us", "--max-size", "64", "-v")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if st != 0 || len(lines) < 25 || !strings.Contains(lines[0], "Linux") || !strings.Contains(lines[9], "MB/s") || len(lines[10]) != len(lines[11]) || !strings.HasSuffix(out, " 0 corrupt\n") {
		t.Errorf("status %d: %s\n%s", st, errs, out)
	}
	// Without -v: the best way in each direction, by the processor and by an engine.
	st, out, errs = b.run("", "bench", "dma", "loopback", "--duration", "100us", "--max-size", "64")
	lines = strings.Split(strings.TrimSpace(out), "\n")
	four := regexp.MustCompile(`^(host to board|board to host)  (processor|engine   )  \d+ MB/s +64 bytes  \w+ (copy|engine)[ ,]`)
	if st != 0 || len(lines) != 10 || !strings.HasSuffix(out, " 0 corrupt; -v shows all\n") {
		t.Fatalf("status %d: %s\n%s", st, errs, out)
	}
	for _, l := range lines[4:8] {
		if !four.MatchString(l) {
			t.Errorf("%q does not match %s", l, four)
		}
	}
	for _, bad := range [][]string{
		{"bench", "dma"}, {"bench", "dma", "loopback", "--max-size", "5M"}, {"bench", "dma", "loopback", "--max-size", "x"},
		{"bench", "dma", "loopback", "--duration", "1h"}, {"bench", "dma", "loopback", "--offset", "17"},
		{"bench", "dma", "loopback", "--plot", "/nonexistent/x.svg"}, {"bench", "dma", "nokind:x"}, {"bench", "dma", "ivshmem:0000:ff:1f.7"},
	} {
		st, out, errs := b.run("", bad...)
		if st == 0 || out != "" || strings.Count(strings.TrimSpace(errs), "\n") != 0 || errs == "" {
			t.Errorf("%v: status %d, %q, %q", bad, st, out, errs)
		}
	}
}

// TestBenchDMASpares: a window that an agent has its link in is not overwritten, unless that is asked for.
func TestBenchDMASpares(t *testing.T) {
	b := newBox(t)
	path := filepath.Join(t.TempDir(), "s")
	s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 1 << 20, Vectors: 1})
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve()
	defer s.Close()
	agent, err := board.Open("loopback:"+path, board.Options{Side: board.Agent})
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	w := agent.Window()
	bench := []string{"bench", "dma", "loopback:" + path, "--duration", "100us", "--max-size", "64"}
	if st, out, errs := b.run("", bench...); st != 0 {
		t.Errorf("an empty window: status %d, %s%s", st, out, errs)
	}
	w.Mem.Zero(0, w.Mem.Size())
	w.Mem.Store32(0, virtiomsg.Magic)
	st, _, errs := b.run("", bench...)
	sum := uint64(0)
	for off := uint64(8); off < w.Mem.Size(); off += 8 {
		sum |= w.Mem.Load64(off)
	}
	if st != exitUsage || !strings.Contains(errs, "agent") || sum != 0 {
		t.Errorf("status %d, %q; the window was written: %v", st, errs, sum != 0)
	}
	if st, out, errs := b.run("", append(bench, "--force", "--offset", "4K")...); st != 0 || w.Mem.Load32(0) != virtiomsg.Magic {
		t.Errorf("behind the link page: status %d, %s%s", st, out, errs)
	}
}
