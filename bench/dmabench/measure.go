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

// batched is the size in bytes below which copies are timed in batches: one takes less time than to read the clock.
const batched = 2 << 10

// now reads the clock. A test counts how often.
var now = time.Now

// direct copies by the processor. Small copies are timed in batches; those of the runtime between two memories that are
// RAM are nothing but that copy, without what a span takes to be checked and accounted.
func (m *meter) direct(d time.Duration) int {
	c := &m.jobs[0].c
	few := max(1, 16384/m.size)
	var dst, src []byte
	if m.v.Name == RuntimeCopy && m.size < batched {
		to, ok := c.Dst.RAM()
		from, ok2 := c.Src.RAM()
		if ok && ok2 {
			dst, src = to.Bytes(), from.Bytes()
		}
	}
	n := 0
	start := now()
	for began := start; ; {
		if dst != nil {
			for range few {
				copy(dst, src)
			}
		} else {
			for range few {
				dma.CopySpan(c.Dst, c.Src)
			}
		}
		end := now()
		m.lat = append(m.lat, end.Sub(start).Seconds()/float64(few))
		n += few
		if end.Sub(began) >= d {
			return n
		}
		start = end
	}
}

// flight keeps all copies in flight for about d, or does each once. Small copies are timed in batches: what one took
// is the batch's time by the copies that were in flight at once.
func (m *meter) flight(d time.Duration, copies *int) error {
	if m.done == nil {
		m.done = make([]dma.Completion, 16)
	}
	few := 1
	if m.size < batched {
		few = 16384 / m.size
	}
	queue := make([]dma.Copy, 0, len(m.jobs))
	began := now()
	for i := range m.jobs {
		m.jobs[i].start = began
		queue = append(queue, m.jobs[i].c)
	}
	flying, idle, over := 0, 0, false
	batch := 0 // copies that ended since last
	for last, t := began, began; flying > 0 || len(queue) > 0; {
		n, err := m.e.Submit(queue)
		if err != nil {
			m.e.Abort()
			return err
		}
		flying += n
		queue = append(queue[:0], queue[n:]...)
		n = m.e.Poll(m.done)
		if n == 0 {
			// The clock is read at times: an engine that stops is noticed.
			if idle++; few == 1 || idle%1024 == 0 {
				if t = now(); t.Sub(last) > 5*time.Second {
					m.e.Abort()
					return fmt.Errorf("a copy of %d bytes: %w", m.size, dma.ErrTimeout)
				}
				over = over || t.Sub(began) >= d
			}
			continue
		}
		if batch += n; few == 1 || batch >= few {
			t = now()
			over = over || t.Sub(began) >= d
			if few > 1 && copies != nil {
				m.lat = append(m.lat, t.Sub(last).Seconds()/float64(batch)*float64(len(m.jobs)))
			}
			last, batch = t, 0
		}
		idle = 0
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
			if few == 1 {
				m.lat = append(m.lat, t.Sub(j.start).Seconds())
			}
			*copies++
			if !over {
				j.start = t
				queue = append(queue, j.c)
			}
		}
	}
	if len(m.lat) == 0 && copies != nil && *copies > 0 { // fewer than a batch
		m.lat = append(m.lat, now().Sub(began).Seconds()/float64(*copies)*float64(len(m.jobs)))
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
