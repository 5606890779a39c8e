package block

import (
	"math/bits"
)

// pageSize is the unit of the memory for data.
const pageSize = 4096

// pool hands out runs of pages, next fit.
type pool struct {
	used  []uint64 // a bit for each page
	pages int
	free  int
	next  int
}

func newPool(pages int) *pool {
	return &pool{used: make([]uint64, (pages+63)/64), pages: pages, free: pages}
}

// pagesFor returns how many pages n bytes take.
func pagesFor(n uint32) int { return int((uint64(n) + pageSize - 1) / pageSize) }

// take takes n pages that follow one another, and returns the first; false if there are none.
func (p *pool) take(n int) (int, bool) {
	if n > p.free {
		return 0, false
	}
	first, ok := p.find(p.next, p.pages, n)
	if !ok {
		end := p.next + n - 1 // runs that start before next may reach over it
		if end > p.pages {
			end = p.pages
		}
		if first, ok = p.find(0, end, n); !ok {
			return 0, false
		}
	}
	for i := first; i < first+n; i++ {
		p.used[i/64] |= 1 << (uint(i) % 64)
	}
	p.free -= n
	if p.next = first + n; p.next >= p.pages {
		p.next = 0
	}
	return first, true
}

// find looks for n free pages from page lo on, before page hi.
func (p *pool) find(lo, hi, n int) (int, bool) {
	run := 0
	for i := lo; i < hi; {
		w := p.used[i/64] >> (uint(i) % 64)
		if w&1 != 0 {
			run = 0
			i += bits.TrailingZeros64(^w) // at most to the end of the word, as zeros are shifted in
			continue
		}
		z := 64 - i%64
		if w != 0 {
			z = bits.TrailingZeros64(w)
		}
		if z > hi-i {
			z = hi - i
		}
		if run+z >= n {
			return i - run, true
		}
		run += z
		i += z
	}
	return 0, false
}

// give frees n pages.
func (p *pool) give(first, n int) {
	for i := first; i < first+n; i++ {
		p.used[i/64] &^= 1 << (uint(i) % 64)
	}
	p.free += n
}
