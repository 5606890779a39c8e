package vm

import "strings"

// compareVersions orders Debian's version numbers (deb-version(7)): it returns a number below, equal to or above 0.
func compareVersions(a, b string) int {
	ae, av := cutEpoch(a)
	be, bv := cutEpoch(b)
	if c := comparePart(ae, be); c != 0 {
		return c
	}
	au, ar := cutRevision(av)
	bu, br := cutRevision(bv)
	if c := comparePart(au, bu); c != 0 {
		return c
	}
	return comparePart(ar, br)
}

func cutEpoch(v string) (epoch, rest string) {
	if e, r, ok := strings.Cut(v, ":"); ok {
		return e, r
	}
	return "0", v
}

func cutRevision(v string) (upstream, revision string) {
	if i := strings.LastIndexByte(v, '-'); i >= 0 {
		return v[:i], v[i+1:]
	}
	return v, "0"
}

// comparePart compares, in turns, text, where '~' is before the end and letters before all else, and numbers.
func comparePart(a, b string) int {
	digit := func(s string) bool { return s != "" && s[0] >= '0' && s[0] <= '9' }
	rank := func(s string) int {
		switch {
		case s == "" || digit(s):
			return 0
		case s[0] == '~':
			return -1
		case s[0] >= 'a' && s[0] <= 'z' || s[0] >= 'A' && s[0] <= 'Z':
			return int(s[0])
		}
		return int(s[0]) + 256
	}
	number := func(s string) (num, rest string) {
		n := 0
		for digit(s[n:]) {
			n++
		}
		return strings.TrimLeft(s[:n], "0"), s[n:]
	}
	for a != "" || b != "" {
		for a != "" && !digit(a) || b != "" && !digit(b) {
			if c := rank(a) - rank(b); c != 0 {
				return c
			}
			a, b = a[1:], b[1:] // the same rank, not of the end: both have a character
		}
		var an, bn string
		an, a = number(a)
		bn, b = number(b)
		if len(an) != len(bn) {
			return len(an) - len(bn)
		}
		if c := strings.Compare(an, bn); c != 0 {
			return c
		}
	}
	return 0
}
