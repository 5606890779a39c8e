package dmabench

import (
	"fmt"
	"io"
	"sort"

	"github.com/boardlink/boardlink/bench/benchkit"
)

// Plot writes an SVG: throughput over size, aligned, one line for each variant and direction with the number in flight that is best at the
// largest size, and the theoretical limit of the link where it is known.
func Plot(w io.Writer, r *Result) error {
	p := benchkit.Plot{
		Title: fmt.Sprintf("%s (%s): throughput by size, aligned; every copy checked", r.Target.Name, r.Target.Memory),
		X:     "bytes of one copy",
		XText: func(v float64) string { return SizeString(int(v)) },
		YText: func(v float64) string {
			if v >= 1000 {
				return fmt.Sprintf("%g GB/s", v/1000)
			}
			return fmt.Sprintf("%g MB/s", v)
		},
	}
	best := map[string]map[int]float64{} // variant and direction: in flight: MB/s at the largest size
	for _, m := range r.Points {
		if !m.Aligned {
			continue
		}
		k := m.Variant + "\x00" + string(m.Direction)
		if best[k] == nil {
			best[k] = map[int]float64{}
		}
		best[k][m.InFlight] = m.MBps
	}
	seen := map[string]int{}
	for _, m := range r.Points {
		k := m.Variant + "\x00" + string(m.Direction)
		if !m.Aligned || m.MBps <= 0 {
			continue
		}
		flights := make([]int, 0, 4)
		for f := range best[k] {
			flights = append(flights, f)
		}
		sort.Slice(flights, func(i, j int) bool { return best[k][flights[i]] > best[k][flights[j]] })
		if m.InFlight != flights[0] {
			continue
		}
		i, ok := seen[k]
		if !ok {
			i = len(p.Lines)
			seen[k] = i
			name := fmt.Sprintf("%s, %s", m.Variant, m.Direction)
			if len(flights) > 1 {
				name += fmt.Sprintf(", %d in flight", m.InFlight)
			}
			p.Lines = append(p.Lines, benchkit.PlotLine{Name: name, Colour: i / 2, Dash: m.Direction == BoardToHost})
		}
		p.Lines[i].Points = append(p.Lines[i].Points, benchkit.PlotPoint{X: float64(m.Size), Y: m.MBps})
	}
	if l := r.Target.Link; l != nil {
		p.Limits = append(p.Limits, benchkit.PlotLimit{Y: l.LimitMBps,
			Text: fmt.Sprintf("limit of the link: x%d at %g GT/s, payloads of %d bytes: %.0f MB/s", l.Width, l.SpeedGTps, l.MaxPayload, l.LimitMBps)})
	}
	return p.Write(w)
}
