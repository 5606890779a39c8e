package vfio

import (
	"fmt"
	"sort"
)

// iovaSpace gives out bus addresses. It is not safe for concurrent use.
type iovaSpace struct {
	valid []extent // what the IOMMU takes, sorted, no overlaps
	page  uint64   // granularity, a power of two
	used  []extent // sorted
}

// defaultRanges are for kernels that do not tell theirs (before 5.4): below 512 GiB, without the range of
// x86's interrupt messages.
var defaultRanges = []extent{{0, 0xfee00000}, {0xfef00000, 1<<39 - 0xfef00000}}

func newIOVASpace(valid []extent, page uint64) (*iovaSpace, error) {
	if page == 0 || page&(page-1) != 0 {
		return nil, fmt.Errorf("page size %#x", page)
	}
	s := &iovaSpace{page: page}
	for _, v := range valid {
		s.addRange(v)
	}
	return s, nil
}

// addRange makes more addresses valid.
func (s *iovaSpace) addRange(v extent) {
	s.valid = append(s.valid, v)
	sort.Slice(s.valid, func(i, j int) bool { return s.valid[i].start < s.valid[j].start })
}

// maxAlign bounds the natural alignment that large maps get, so that the IOMMU can use its largest
// pages.
const maxAlign = 1 << 30

// alloc takes size bytes, a multiple of the page, at or below the highest address mask (0: no limit),
// lowest first. Address 0 is never given out: boards take it for "none".
func (s *iovaSpace) alloc(size, mask uint64) (uint64, bool) {
	if size == 0 || size&(s.page-1) != 0 {
		return 0, false
	}
	if mask == 0 {
		mask = ^uint64(0)
	}
	align := s.page
	for align < size && align < maxAlign && size&(align<<1-1) == 0 {
		align <<= 1
	}
	for ; ; align >>= 1 { // better badly aligned than not at all
		if a, ok := s.fit(size, align, mask); ok {
			s.insert(extent{a, size})
			return a, true
		}
		if align <= s.page {
			return 0, false
		}
	}
}

func (s *iovaSpace) fit(size, align, mask uint64) (uint64, bool) {
	for _, v := range s.valid {
		end := v.start + v.size // exclusive; 0 never occurs, see parseIOVARanges
		at := v.start
		if at == 0 {
			at = s.page
		}
		for {
			up := at + align - 1
			if up < at {
				break
			}
			at = up &^ (align - 1)
			if at >= end || size > end-at || size-1 > mask || at > mask-(size-1) {
				break
			}
			u, clash := s.clash(at, size)
			if !clash {
				return at, true
			}
			at = u.start + u.size
		}
	}
	return 0, false
}

// clash returns the lowest used extent that overlaps.
func (s *iovaSpace) clash(at, size uint64) (extent, bool) {
	i := sort.Search(len(s.used), func(i int) bool { return s.used[i].start+s.used[i].size > at })
	if i < len(s.used) && s.used[i].start < at+size {
		return s.used[i], true
	}
	return extent{}, false
}

func (s *iovaSpace) insert(e extent) {
	i := sort.Search(len(s.used), func(i int) bool { return s.used[i].start > e.start })
	s.used = append(s.used, extent{})
	copy(s.used[i+1:], s.used[i:])
	s.used[i] = e
}

// free gives back what alloc returned.
func (s *iovaSpace) free(at uint64) {
	for i, u := range s.used {
		if u.start == at {
			s.used = append(s.used[:i], s.used[i+1:]...)
			return
		}
	}
}
