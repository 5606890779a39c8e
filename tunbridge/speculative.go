package tunbridge

// Speculative reads are rationed: an empty one must be earned back by missFrames moved frames; at most maxMisses
// may be owed.
const (
	missFrames = 24
	maxMisses  = 4
)

// speculative decides whether a loop reads its interface although nothing announced a frame. Frames that went
// out by the interface often have their answers there at once, and an empty read is a system call.
type speculative struct {
	off    bool // as configured
	credit int  // frames moved, less what empty reads cost
}

// allowed tells whether a speculative read may be made now.
func (s *speculative) allowed() bool { return !s.off && s.credit >= 0 }

// missed notes a speculative read that found nothing.
func (s *speculative) missed() { s.credit -= missFrames }

// earned notes frames that were moved.
func (s *speculative) earned(frames int) {
	if s.credit += frames; s.credit > (maxMisses-1)*missFrames {
		s.credit = (maxMisses - 1) * missFrames
	}
}
