//go:build linux

package benchkit

import (
	"errors"
	"fmt"
	"html"
	"io"
	"math"
	"strings"
)

// Geometry of a plot, in pixels.
const (
	plotW, plotH               = 980, 560
	plotL, plotR, plotT, plotB = 80, 310, 50, 60
)

var colours = []string{"#1b6ca8", "#c8553d", "#2a9d5c", "#8a4fbf", "#d19a1d", "#4c4c4c", "#0e8f9c", "#b03a76"}

// Plot is a sweep: values over sizes, which double.
type Plot struct {
	Title string
	X     string               // what the sizes are: "bytes of one copy"
	XText func(float64) string // at the axis; nil: a plain number
	YText func(float64) string
	// Linear has the values from 0 on; else their scale is logarithmic, in decades.
	Linear bool
	Lines  []PlotLine
	Limits []PlotLimit
}

// PlotLine is one curve. Lines of one colour (an index) belong together; Dash tells them apart.
type PlotLine struct {
	Name   string
	Colour int
	Dash   bool
	Points []PlotPoint // X rising
}

// PlotPoint is a value at a size; both are above 0.
type PlotPoint struct{ X, Y float64 }

// PlotLimit is a level that nothing can pass, or that is aimed at.
type PlotLimit struct {
	Y    float64
	Text string
}

// Write writes the plot as SVG.
func (p *Plot) Write(w io.Writer) error {
	lo, hi, small, large := math.Inf(1), 0.0, math.Inf(1), 0.0
	for _, l := range p.Lines {
		for _, pt := range l.Points {
			if !(pt.X > 0) || !(pt.Y > 0) || math.IsInf(pt.Y, 1) {
				return fmt.Errorf("plot %q, line %q: %v at %v cannot be drawn", p.Title, l.Name, pt.Y, pt.X)
			}
			lo, hi = math.Min(lo, pt.Y), math.Max(hi, pt.Y)
			small, large = math.Min(small, pt.X), math.Max(large, pt.X)
		}
	}
	if large == 0 {
		return errors.New("nothing to plot")
	}
	for _, l := range p.Limits {
		lo, hi = math.Min(lo, l.Y), math.Max(hi, l.Y)
	}
	xText, yText := p.XText, p.YText
	plain := func(v float64) string { return fmt.Sprintf("%g", v) }
	if xText == nil {
		xText = plain
	}
	if yText == nil {
		yText = plain
	}
	const high, wide = plotH - plotT - plotB, plotW - plotL - plotR
	var grid []float64
	y := func(v float64) float64 { return plotH - plotB - high*v/hi } // hi is rounded below
	if p.Linear {
		step := math.Pow(10, math.Floor(math.Log10(hi)))
		for _, k := range []float64{0.1, 0.2, 0.5, 1} {
			if hi/(step*k) <= 10 {
				step *= k
				break
			}
		}
		hi = step * math.Ceil(hi/step*1.02)
		for i := 0; float64(i)*step < hi+step/2; i++ {
			grid = append(grid, float64(i)*step)
		}
	} else {
		llo, lhi := math.Floor(math.Log10(lo)), math.Ceil(math.Log10(hi)+0.02)
		for e := llo; e <= lhi; e++ {
			grid = append(grid, math.Pow(10, e))
		}
		y = func(v float64) float64 { return plotH - plotB - high*(math.Log10(v)-llo)/(lhi-llo) }
	}
	x := func(size float64) float64 {
		return plotL + wide*math.Log2(size/small)/math.Max(1, math.Log2(large/small))
	}
	var b strings.Builder
	text := func(px, py float64, anchor, s string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", px, py, anchor, html.EscapeString(s))
	}
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", plotW, plotH, plotW, plotH)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", plotW, plotH)
	text(plotL, 24, "start", p.Title)
	for _, v := range grid {
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/>`+"\n", plotL, plotW-plotR, y(v), y(v))
		text(plotL-8, y(v)+4, "end", yText(v))
	}
	step := 2.0
	if large/small > 256 {
		step = 4
	}
	for s := small; s <= large; s *= step {
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#eee"/>`+"\n", x(s), x(s), plotT, plotH-plotB)
		text(x(s), plotH-plotB+18, "middle", xText(s))
	}
	text(plotL+wide/2, plotH-16, "middle", p.X)
	for _, l := range p.Limits {
		fmt.Fprintf(&b, `<line class="limit" x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="black" stroke-width="2" stroke-dasharray="8 4"/>`+"\n", plotL, plotW-plotR, y(l.Y), y(l.Y))
		text(plotL+6, y(l.Y)-6, "start", l.Text)
	}
	for i, l := range p.Lines {
		colour := colours[l.Colour%len(colours)]
		dash := ""
		if l.Dash {
			dash = ` stroke-dasharray="4 3"`
		}
		var pts []string
		for _, pt := range l.Points {
			pts = append(pts, fmt.Sprintf("%.1f,%.1f", x(pt.X), y(pt.Y)))
		}
		fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" stroke-width="2"%s points="%s"/>`+"\n", colour, dash, strings.Join(pts, " "))
		py := float64(plotT + 20*i)
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="%s" stroke-width="2"%s/>`+"\n", plotW-plotR+12, plotW-plotR+40, py, py, colour, dash)
		text(plotW-plotR+46, py+4, "start", l.Name)
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}
