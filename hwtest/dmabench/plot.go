package dmabench

import (
	"fmt"
	"html"
	"io"
	"math"
	"sort"
	"strings"
)

// Geometry of the plot, in pixels.
const (
	plotW, plotH               = 980, 560
	plotL, plotR, plotT, plotB = 80, 310, 50, 60
)

var colours = []string{"#1b6ca8", "#c8553d", "#2a9d5c", "#8a4fbf", "#d19a1d", "#4c4c4c", "#0e8f9c", "#b03a76"}

// Plot writes an SVG: throughput over size, aligned, one line for each variant and direction with the number in flight that is best at the
// largest size, and the theoretical limit of the link where it is known.
func Plot(w io.Writer, r *Result) error {
	type line struct {
		name string
		dash bool
		pts  []Point
	}
	var lines []line
	best := map[string]map[int]float64{} // variant and direction: in flight: MB/s at the largest size
	for _, p := range r.Points {
		if !p.Aligned {
			continue
		}
		k := p.Variant + "\x00" + string(p.Direction)
		if best[k] == nil {
			best[k] = map[int]float64{}
		}
		best[k][p.InFlight] = p.MBps
	}
	seen := map[string]int{}
	lo, hi, small, large := math.Inf(1), 0.0, math.MaxInt, 0
	for _, p := range r.Points {
		k := p.Variant + "\x00" + string(p.Direction)
		if !p.Aligned || p.MBps <= 0 {
			continue
		}
		flights := make([]int, 0, 4)
		for f := range best[k] {
			flights = append(flights, f)
		}
		sort.Slice(flights, func(i, j int) bool { return best[k][flights[i]] > best[k][flights[j]] })
		if p.InFlight != flights[0] {
			continue
		}
		i, ok := seen[k]
		if !ok {
			i = len(lines)
			seen[k] = i
			name := fmt.Sprintf("%s, %s", p.Variant, p.Direction)
			if len(flights) > 1 {
				name += fmt.Sprintf(", %d in flight", p.InFlight)
			}
			lines = append(lines, line{name: name, dash: p.Direction == BoardToHost})
		}
		lines[i].pts = append(lines[i].pts, p)
		lo, hi = math.Min(lo, p.MBps), math.Max(hi, p.MBps)
		small, large = min(small, p.Size), max(large, p.Size)
	}
	if len(lines) == 0 {
		return fmt.Errorf("nothing to plot")
	}
	if l := r.Target.Link; l != nil {
		hi = math.Max(hi, l.LimitMBps)
	}
	lo, hi = math.Floor(math.Log10(lo)), math.Ceil(math.Log10(hi)+0.02)
	x := func(size int) float64 {
		span := math.Max(1, math.Log2(float64(large)/float64(small)))
		return plotL + (plotW-plotL-plotR)*math.Log2(float64(size)/float64(small))/span
	}
	y := func(mbps float64) float64 { return plotH - plotB - (plotH-plotT-plotB)*(math.Log10(mbps)-lo)/(hi-lo) }
	var b strings.Builder
	text := func(px, py float64, anchor, s string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", px, py, anchor, html.EscapeString(s))
	}
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", plotW, plotH, plotW, plotH)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", plotW, plotH)
	text(plotL, 24, "start", fmt.Sprintf("%s (%s): throughput by size, aligned; every copy checked", r.Target.Name, r.Target.Memory))
	for e := lo; e <= hi; e++ {
		py := y(math.Pow(10, e))
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/>`+"\n", plotL, plotW-plotR, py, py)
		label := fmt.Sprintf("%.0f MB/s", math.Pow(10, e))
		if e >= 3 {
			label = fmt.Sprintf("%.0f GB/s", math.Pow(10, e-3))
		} else if e < 0 {
			label = fmt.Sprintf("%g MB/s", math.Pow(10, e))
		}
		text(plotL-8, py+4, "end", label)
	}
	for s := small; s <= large; s *= 4 {
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#eee"/>`+"\n", x(s), x(s), plotT, plotH-plotB)
		text(x(s), plotH-plotB+18, "middle", SizeString(s))
	}
	text(plotL+(plotW-plotL-plotR)/2, plotH-16, "middle", "bytes of one copy")
	if l := r.Target.Link; l != nil {
		py := y(l.LimitMBps)
		fmt.Fprintf(&b, `<line class="limit" x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="black" stroke-width="2" stroke-dasharray="8 4"/>`+"\n", plotL, plotW-plotR, py, py)
		text(plotL+6, py-6, "start", fmt.Sprintf("limit of the link: x%d at %g GT/s, payloads of %d bytes: %.0f MB/s", l.Width, l.SpeedGTps, l.MaxPayload, l.LimitMBps))
	}
	for i, l := range lines {
		colour := colours[i/2%len(colours)]
		dash := ""
		if l.dash {
			dash = ` stroke-dasharray="4 3"`
		}
		var pts []string
		for _, p := range l.pts {
			pts = append(pts, fmt.Sprintf("%.1f,%.1f", x(p.Size), y(p.MBps)))
		}
		fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" stroke-width="2"%s points="%s"/>`+"\n", colour, dash, strings.Join(pts, " "))
		py := float64(plotT + 20*i)
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="%s" stroke-width="2"%s/>`+"\n", plotW-plotR+12, plotW-plotR+40, py, py, colour, dash)
		text(plotW-plotR+46, py+4, "start", l.name)
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}
