package tunbridge

// A batchEnd predicts where a batch of frames from the interface ends. Only an empty read shows that the
// interface is drained, and with small batches, such as those of super-packets, nearly half of all
// reads would be empty. So a batch ends where the last ones ended, and the poll before a sleep
// tells of frames that were left. Every maxPredicted batches, sooner where frames were left, a batch is read
// until an empty read.
type batchEnd struct {
	off       bool // as configured
	size      int  // frames of the last batch that was read until an empty read
	done      int  // frames of this batch, which is read in several steps
	run       int  // predicted ends since; from maxPredicted on the next is not predicted
	predicted bool // the last batch ended so, and the descriptors have not been polled since
	rest      bool // this batch is what a predicted end left
}

const (
	maxPredictSize = 16 // frames; an empty read does not matter beside larger batches
	maxPredicted   = 16
	maxPredictOut  = 4 // frames from the ring in the same step; beside more the end is not predicted
	leftPredicted  = 4 // what a batch that left frames counts for
)

// next returns how many frames to read now, 0 for all.
func (e *batchEnd) next() int {
	if e.off || e.size >= maxPredictSize || e.run >= maxPredicted {
		return 0
	}
	return e.size
}

// read notes what a step read that was to take want frames, and tells whether the batch ends there as predicted.
func (e *batchEnd) read(want int, in result) bool {
	e.predicted = want > 0 && in.frames == want
	switch e.done += in.frames; {
	case e.predicted:
		e.run++
		e.done, e.rest = 0, false
	case in.dry && e.done > 0:
		if !e.rest || e.done > e.size {
			e.size = e.done
		}
		e.done, e.run, e.rest = 0, 0, false
	}
	return e.predicted
}

// polled notes that the descriptors were polled, and whether the interface has frames.
func (e *batchEnd) polled(more bool) {
	if e.rest = e.predicted && more; e.rest {
		e.run += leftPredicted
	}
	e.predicted = false
}
