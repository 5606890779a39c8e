//go:build linux

// Package diskbench measures disks by fio: boardlink's export of a host's disk on the board, beside qemu-nbd over a unix socket, and beside the
// image itself, in turns.
//
// It must not know how a disk comes across the link.
package diskbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/trial"
)

// Paths that are measured beside those of boardlink.
const (
	QEMU = "qemu-nbd" // over a unix socket, with its defaults
	File = "file"     // fio on the image, by io_uring through the page cache
)

// Boardlink is a link to measure.
type Boardlink struct {
	Name  string
	Trial trial.Config
}

// Config says what to measure. The zero value of a field stands for its default, where it has one.
type Config struct {
	Boardlink []Boardlink
	Paths     []string       // names; default: all
	Dir       string         // where the images are made; default: the directory for temporary files
	Size      int64          // of each image, bytes; default 256 MiB
	Rounds    int            // default 3
	Duration  time.Duration  // of each measurement; default 1 s
	Only      *regexp.Regexp // leaves out the measurements whose names it does not match
	DiskKeys  string         // further keys of the host's --disk, e.g. "direct,cache=none"
	Step      func(string)   // if set, hears what is measured
	// Environment is the machine as the caller found it; nil: Run looks itself.
	Environment *benchkit.Environment
}

// ErrMissing: a program that measures, or is measured, is not installed.
var ErrMissing = errors.New("is not installed")

// measure is one of the figures.
type measure struct {
	name, unit string
	rw, size   string
	depth      int
}

var measures = []measure{
	{"random read, 4 KiB, depth 1", "IOPS", "randread", "4k", 1},
	{"random write, 4 KiB, depth 1", "IOPS", "randwrite", "4k", 1},
	{"random read, 4 KiB, depth 32", "IOPS", "randread", "4k", 32},
	{"random write, 4 KiB, depth 32", "IOPS", "randwrite", "4k", 32},
	{"read, 1 MiB, depth 4", "MB/s", "read", "1m", 4},
	{"write, 1 MiB, depth 4", "MB/s", "write", "1m", 4},
}

// Series is what the rounds gave.
type Series struct {
	benchkit.Spread
	Rounds []float64 `json:"rounds"`
}

func series(v []float64) Series { return Series{benchkit.SpreadOf(v), v} }

// Figure is one of the figures, for each path.
type Figure struct {
	Name  string            `json:"name"`
	Unit  string            `json:"unit"` // more is better
	Paths map[string]Series `json:"paths"`
	// P50 is the median time of a request, in microseconds.
	P50 map[string]Series `json:"p50_us"`
	// OfQEMU are the ratios of each other path, by its name, to qemu-nbd, in each round.
	OfQEMU map[string]Series `json:"of_qemu_nbd,omitempty"`
}

// Result is what was measured.
type Result struct {
	Environment *benchkit.Environment `json:"environment"`
	FIO         string                `json:"fio"`
	QEMU        string                `json:"qemu_nbd,omitempty"`
	Size        int64                 `json:"size"`
	Seconds     float64               `json:"seconds"`
	Rounds      int                   `json:"rounds"`
	Paths       []string              `json:"paths"`
	Figures     []Figure              `json:"figures"`
}

// Check tells what is wrong with c, as Run would.
func (c Config) Check() error { return c.setDefaults() }

func (c *Config) setDefaults() error {
	known := []string{}
	for _, b := range c.Boardlink {
		known = append(known, b.Name)
	}
	known = append(known, QEMU, File)
	if c.Paths == nil {
		c.Paths = known
	}
	for i, p := range c.Paths {
		if !slices.Contains(known, p) || slices.Contains(c.Paths[:i], p) {
			return fmt.Errorf("path %q: each once of %s", p, strings.Join(known, ", "))
		}
	}
	if c.Size == 0 {
		c.Size = 256 << 20
	}
	if c.Rounds == 0 {
		c.Rounds = 3
	}
	if c.Duration == 0 {
		c.Duration = time.Second
	}
	if c.Step == nil {
		c.Step = func(string) {}
	}
	if len(c.todo()) == 0 {
		return fmt.Errorf("no measurement matches %v", c.Only)
	}
	for _, tool := range []string{"fio", QEMU} {
		if _, err := exec.LookPath(tool); err != nil && (tool == "fio" || slices.Contains(c.Paths, tool)) {
			return fmt.Errorf("%s %w: apt-get install %s", tool, ErrMissing, map[string]string{"fio": "fio", QEMU: "qemu-utils"}[tool])
		}
	}
	return nil
}

func (c *Config) todo() (ms []measure) {
	for _, m := range measures {
		if c.Only == nil || c.Only.MatchString(m.name) {
			ms = append(ms, m)
		}
	}
	return ms
}

// Run measures.
func Run(ctx context.Context, c Config) (*Result, error) {
	if err := c.setDefaults(); err != nil {
		return nil, err
	}
	r := &Result{Environment: c.Environment, Size: c.Size, Seconds: c.Duration.Seconds(), Rounds: c.Rounds, Paths: c.Paths, FIO: version("fio")}
	if slices.Contains(c.Paths, QEMU) {
		r.QEMU = version(QEMU)
	}
	if r.Environment == nil {
		var err error
		if r.Environment, err = benchkit.Look([2]int{}); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp(c.Dir, "diskbench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	ends := map[string]*path{}
	defer func() {
		for _, p := range ends {
			p.stop()
		}
	}()
	for _, name := range c.Paths {
		c.Step("preparing " + name)
		p, err := c.open(ctx, dir, name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		ends[name] = p
	}
	for _, m := range c.todo() {
		values, p50 := map[string][]float64{}, map[string][]float64{}
		for round := 0; round < c.Rounds; round++ {
			for i := range c.Paths {
				name := c.Paths[(i+round)%len(c.Paths)] // each is the first one, now and then
				c.Step(fmt.Sprintf("%s: %s, round %d of %d", m.name, name, round+1, c.Rounds))
				v, us, err := c.fio(ctx, m, ends[name])
				if err != nil {
					return nil, fmt.Errorf("%s, %s: %w", name, m.name, err)
				}
				values[name], p50[name] = append(values[name], v), append(p50[name], us)
			}
		}
		f := Figure{Name: m.name, Unit: m.unit, Paths: map[string]Series{}, P50: map[string]Series{}}
		for _, name := range c.Paths {
			f.Paths[name], f.P50[name] = series(values[name]), series(p50[name])
			if of := values[QEMU]; of != nil && name != QEMU {
				if f.OfQEMU == nil {
					f.OfQEMU = map[string]Series{}
				}
				var ratios []float64
				for i, v := range values[name] {
					ratios = append(ratios, v/of[i])
				}
				f.OfQEMU[name] = series(ratios)
			}
		}
		r.Figures = append(r.Figures, f)
	}
	return r, nil
}

func version(tool string) string {
	out, _ := exec.Command(tool, "--version").Output()
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}

// path is a disk that is ready to be measured.
type path struct {
	args []string // of fio
	stop func()
}

// open makes the image and what serves it.
func (c *Config) open(ctx context.Context, dir, name string) (*path, error) {
	img := filepath.Join(dir, name+".img")
	if err := fill(img, c.Size); err != nil {
		return nil, err
	}
	sock := filepath.Join(dir, name+".sock")
	p := &path{args: []string{"--ioengine=nbd", "--uri=nbd+unix:///?socket=" + sock}, stop: func() {}}
	switch name {
	case File:
		p.args = []string{"--ioengine=io_uring", "--filename=" + img}
		return p, nil
	case QEMU:
		cmd := exec.Command(QEMU, "-k", sock, "-f", "raw", "-t", "-e", "16", "--cache=writeback", "--discard=unmap", img)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		p.stop = func() { cmd.Process.Kill(); cmd.Wait() }
	default:
		i := slices.IndexFunc(c.Boardlink, func(b Boardlink) bool { return b.Name == name })
		t := c.Boardlink[i].Trial
		disk := "name=bench,file=" + img
		if c.DiskKeys != "" {
			disk += "," + c.DiskKeys
		}
		t.HostArgs = append(slices.Clone(t.HostArgs), "--disk", disk)
		t.AgentArgs = append(slices.Clone(t.AgentArgs), "--disk", "name=bench,export="+sock)
		rig, err := trial.Start(t)
		if err != nil {
			return nil, err
		}
		p.stop = func() { rig.Close() }
		if err := rig.WaitUp(ctx); err != nil {
			p.stop()
			return nil, err
		}
	}
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		u, err := net.Dial("unix", sock)
		if err == nil {
			u.Close()
			return p, nil
		}
		if time.Since(begin) > 10*time.Second || ctx.Err() != nil {
			p.stop()
			return nil, err
		}
	}
}

// fill makes an image whose blocks are all there.
func fill(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	for i := range b {
		b[i] = byte(i*7 + i>>12)
	}
	for n := int64(0); n < size; n += int64(len(b)) {
		if _, err := f.Write(b[:min(int64(len(b)), size-n)]); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil { // what is written back later would disturb
		return err
	}
	return f.Close()
}

// fio takes one figure, and the median time of a request in microseconds.
func (c *Config) fio(ctx context.Context, m measure, p *path) (v, p50 float64, err error) {
	args := append([]string{"--name=bench", "--thread", "--output-format=json", "--time_based", "--norandommap", "--rw=" + m.rw, "--bs=" + m.size,
		fmt.Sprintf("--iodepth=%d", m.depth), fmt.Sprintf("--size=%d", c.Size), "--ramp_time=100ms", fmt.Sprintf("--runtime=%dms", c.Duration.Milliseconds())}, p.args...)
	cmd := exec.CommandContext(ctx, "fio", args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return 0, 0, fmt.Errorf("fio %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	type way struct {
		IOPS  float64 `json:"iops"`
		Bytes float64 `json:"bw_bytes"`
		Time  struct {
			P map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var result struct {
		Jobs []struct {
			Error       int `json:"error"`
			Read, Write way
		} `json:"jobs"`
	}
	i := strings.IndexByte(string(out), '{') // notes may precede it
	if i < 0 {
		return 0, 0, fmt.Errorf("fio gives no JSON: %q", out)
	}
	if err := json.Unmarshal(out[i:], &result); err != nil {
		return 0, 0, fmt.Errorf("fio's JSON: %w", err)
	}
	if len(result.Jobs) != 1 || result.Jobs[0].Error != 0 {
		return 0, 0, fmt.Errorf("fio ends with an error: %s%s", errs.String(), out[i:])
	}
	w := result.Jobs[0].Read
	if strings.Contains(m.rw, "write") {
		w = result.Jobs[0].Write
	}
	v = w.IOPS
	if m.unit == "MB/s" {
		v = w.Bytes / 1e6
	}
	return v, w.Time.P["50.000000"] / 1000, nil
}
