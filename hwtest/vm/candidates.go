package vm

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"
)

// candidate is a package of one version in one suite.
type candidate struct {
	src          Source
	pkg, version string
}

func (c candidate) String() string { return c.pkg + " " + c.version + " of " + c.src.Suite }

// badPackage is an error of what a package holds, or of what cannot be made of it: another one may do.
type badPackage struct {
	error
	// suite: no other package of the suite will do either.
	suite bool
}

func (e badPackage) Unwrap() error { return e.error }

// attempts is the error that names all that was tried, a line for each suite and answer.
type attempts struct {
	lines []attempt
}

type attempt struct {
	suite, answer string
	what          []string // packages with their versions; empty: the suite's list of packages
}

func (t *attempts) add(suite, what, answer string) {
	if n := len(t.lines); n > 0 && what != "" && len(t.lines[n-1].what) > 0 && t.lines[n-1].suite == suite && t.lines[n-1].answer == answer {
		t.lines[n-1].what = append(t.lines[n-1].what, what)
		return
	}
	a := attempt{suite: suite, answer: answer}
	if what != "" {
		a.what = []string{what}
	}
	t.lines = append(t.lines, a)
}

// Error has one line for each suite and answer, after an empty first one.
func (t *attempts) Error() string {
	var b strings.Builder
	for _, l := range t.lines {
		fmt.Fprintf(&b, "\n  %s: %s", l.suite, l.answer)
		if len(l.what) > 0 {
			b.WriteString(": " + strings.Join(l.what, ", "))
		}
	}
	return b.String()
}

// pattern is what the names of the packages look like that will do.
func (spec *KernelSpec) pattern() string {
	if spec.exact {
		return "linux-image-" + spec.Version
	}
	return "linux-image-" + spec.Version + ".*-" + spec.Flavour
}

// kernels returns the kernels of the suite that will do for spec, the newest first.
func (a *apt) kernels(ctx context.Context, spec *KernelSpec) ([]candidate, error) {
	prefix := "linux-image-" + spec.Version
	out, err := a.run(ctx, a.dir, "apt-cache", "pkgnames", prefix)
	if err != nil {
		return nil, err
	}
	// linux-image-6.1.0-56-cloud-amd64, linux-image-6.12.90+deb12.1-cloud-amd64
	image := regexp.MustCompile(`^` + regexp.QuoteMeta(prefix) + `\.[0-9]+([-+][a-z0-9.]+)?-` + regexp.QuoteMeta(spec.Flavour) + `$`)
	var names []string
	for _, n := range strings.Fields(out) {
		if image.MatchString(n) && !spec.exact || n == prefix && spec.exact {
			names = append(names, n)
		}
	}
	return a.versions(ctx, names...)
}

// eachCandidate calls try with one kernel after the other, in the order of spec's sources and the newest of
// a source first, until try returns nil. A source's list of packages is read at the start, and
// once more after the first of its files that the mirror does not deliver: the list may be older or newer
// than the files. If nothing arrived, failed names all that was tried. An error is one that no other
// kernel would mend.
func eachCandidate(ctx context.Context, cache string, spec *KernelSpec, try func(*apt, candidate) error) (failed *attempts, err error) {
	failed = &attempts{}
	down := map[string]string{} // by address of the mirror: what it did not answer to
	for _, src := range spec.Sources {
		a, err := newApt(cache, spec.Arch, src)
		if err != nil {
			return nil, err
		}
		s := &search{apt: a, spec: spec, failed: failed, try: try}
		host := a.src.URI
		if u, err := url.Parse(host); err == nil && u.Host != "" {
			host = u.Host
		}
		if why, ok := down[host]; ok {
			failed.add(src.Suite, "", "not tried: "+why)
			continue
		}
		done, err := s.run(ctx)
		if done {
			return nil, nil
		}
		var ae *aptError
		if ctx.Err() != nil {
			return nil, fmt.Errorf("fetch the kernel %s: %w", spec.Name, ctx.Err())
		}
		if errors.As(err, &ae) {
			down[host] = host + " does not answer"
		} else if err != nil {
			return nil, err
		}
	}
	return failed, nil
}

// search is eachCandidate's work at one source.
type search struct {
	*apt
	spec   *KernelSpec
	failed *attempts
	try    func(*apt, candidate) error
	anew   bool // the list of packages was read a second time
}

// run returns true once try is content. An *aptError means that the mirror cannot be reached at all.
func (s *search) run(ctx context.Context) (done bool, err error) {
	if err := s.readIndex(ctx); err != nil {
		return false, err
	}
	if !s.haveIndex() {
		return false, nil
	}
	tried := map[candidate]bool{}
	for {
		all, err := s.kernels(ctx, s.spec)
		if err != nil {
			s.failed.add(s.src.Suite, "", err.Error())
			return false, nil
		}
		if len(all) == 0 {
			s.failed.add(s.src.Suite, "", "its list of packages has no "+s.spec.pattern())
			return false, nil
		}
		again := false
		for _, c := range all {
			if tried[c] {
				continue
			}
			tried[c] = true
			err := s.try(s.apt, c)
			if err == nil {
				return true, nil
			}
			if ctx.Err() != nil {
				return false, err
			}
			var ae *aptError
			var be badPackage
			if !errors.As(err, &ae) && !errors.As(err, &be) {
				return false, err // no space on the device, say
			}
			s.failed.add(s.src.Suite, c.pkg+" "+c.version, err.Error())
			if ae != nil && ae.unreachable() {
				return false, ae
			}
			if be.suite {
				return false, nil
			}
			if ae != nil && !s.anew {
				if err := s.update(ctx, true); err != nil {
					s.failed.add(s.src.Suite, "", "list of packages, fetched anew: "+err.Error())
				}
				s.anew, again = true, true
				break
			}
		}
		if !again {
			return false, nil
		}
	}
}

// readIndex reads the list of packages, once more if the first try fails. An older list will do, too.
func (s *search) readIndex(ctx context.Context) error {
	err := s.update(ctx, false)
	var ae *aptError
	if errors.As(err, &ae) && !ae.unreachable() {
		s.anew = true
		err = s.update(ctx, true)
	}
	if err == nil {
		return nil
	}
	if !errors.As(err, &ae) {
		return err
	}
	answer := "list of packages: " + ae.Error()
	if s.haveIndex() && !ae.unreachable() {
		answer += " (an older list is used)"
	}
	s.failed.add(s.src.Suite, "", answer)
	if ae.unreachable() {
		return ae
	}
	return nil
}
