package dmabench

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/boardlink/boardlink/dma"
	"golang.org/x/sys/unix"
)

// cpuTime returns the processor time of the calling thread.
func cpuTime() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// once does every copy once.
func (m *meter) once() error {
	if m.e == nil {
		for i := range m.jobs {
			dma.CopySpan(m.jobs[i].c.Dst, m.jobs[i].c.Src)
		}
		return nil
	}
	return m.flight(0, nil)
}

// measure copies for about d.
func (m *meter) measure(d time.Duration, p *Point) error {
	m.lat = m.lat[:0]
	copies := 0
	cpu, began := cpuTime(), time.Now()
	var err error
	if m.e == nil {
		copies = m.direct(d)
	} else {
		err = m.flight(d, &copies)
	}
	took := time.Since(began)
	p.CPU = round(min(1, (cpuTime()-cpu).Seconds()/took.Seconds()))
	p.Copies = copies
	p.MBps = round(float64(copies) * float64(m.size) / took.Seconds() / 1e6)
	slices.Sort(m.lat)
	if n := len(m.lat); n > 0 {
		p.P50, p.P99 = round(m.lat[n/2]*1e6), round(m.lat[min(n-1, n*99/100)]*1e6)
	}
	return err
}

func round(f float64) float64 {
	scale := 1000.0
	if f > 100 {
		scale = 10
	}
	return float64(int64(f*scale+0.5)) / scale
}

// direct copies by the processor. Small copies are timed by the dozen, so that the clock does not count.
func (m *meter) direct(d time.Duration) int {
	c := &m.jobs[0].c
	few := max(1, 16384/m.size)
	n := 0
	for began := time.Now(); ; {
		start := time.Now()
		for range few {
			dma.CopySpan(c.Dst, c.Src)
		}
		end := time.Now()
		m.lat = append(m.lat, end.Sub(start).Seconds()/float64(few))
		n += few
		if end.Sub(began) >= d {
			return n
		}
	}
}

// flight keeps all copies in flight for about d, or does each once.
func (m *meter) flight(d time.Duration, copies *int) error {
	if m.done == nil {
		m.done = make([]dma.Completion, 16)
	}
	queue := make([]dma.Copy, 0, len(m.jobs))
	began := time.Now()
	for i := range m.jobs {
		m.jobs[i].start = began
		queue = append(queue, m.jobs[i].c)
	}
	flying := 0
	for last := began; flying > 0 || len(queue) > 0; {
		n, err := m.e.Submit(queue)
		if err != nil {
			m.e.Abort()
			return err
		}
		flying += n
		queue = append(queue[:0], queue[n:]...)
		n = m.e.Poll(m.done)
		now := time.Now()
		for _, c := range m.done[:n] {
			flying--
			if c.Err != nil {
				m.e.Abort()
				return c.Err
			}
			if copies == nil {
				continue
			}
			j := &m.jobs[c.Tag]
			m.lat = append(m.lat, now.Sub(j.start).Seconds())
			*copies++
			if now.Sub(began) < d {
				j.start = now
				queue = append(queue, j.c)
			}
		}
		if n > 0 {
			last = now
		} else if now.Sub(last) > 5*time.Second {
			m.e.Abort()
			return fmt.Errorf("a copy of %d bytes: %w", m.size, dma.ErrTimeout)
		}
	}
	return nil
}

// ratio compares the two copies in turns, so that what disturbs one disturbs the other as well.
func (r *Result) ratio(ctx context.Context, t *Target, c *Config) {
	var cached, device *Variant
	for i := range t.Variants {
		switch t.Variants[i].Name {
		case RuntimeCopy:
			cached = &t.Variants[i]
		case DeviceCopy:
			device = &t.Variants[i]
		}
	}
	const size, rounds = 64 << 10, 41
	if cached == nil || device == nil || cached.Host.Len < 2*size {
		return
	}
	if _, ok := cached.Board.RAM(); !ok {
		return
	}
	r.Ratio = new(Ratio)
	for _, d := range []Direction{HostToBoard, BoardToHost} {
		c.Step("device copy by runtime copy, " + string(d))
		a, b := &meter{v: cached, d: d, host: cached.Host}, &meter{v: device, d: d, host: device.Host}
		if !a.place(size, 1, true) || !b.place(size, 1, true) {
			return
		}
		var all []float64
		for i := 0; i < rounds && ctx.Err() == nil; i++ {
			var pa, pb Point
			a.measure(time.Millisecond, &pa)
			b.measure(time.Millisecond, &pb)
			if pa.P50 > 0 && pb.P50 > 0 {
				all = append(all, pa.P50/pb.P50)
			}
		}
		if len(all) == 0 {
			return
		}
		slices.Sort(all)
		v := round(all[len(all)/2])
		if d == HostToBoard {
			r.Ratio.HostToBoard = v
		} else {
			r.Ratio.BoardToHost = v
		}
	}
}

// SizeString returns "64", "4 KiB", "1 MiB".
func SizeString(n int) string {
	switch {
	case n >= 1<<20 && n%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<10 && n%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d", n)
}
