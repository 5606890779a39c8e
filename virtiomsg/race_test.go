//go:build race

package virtiomsg

// modelRounds: the model has a single goroutine; the race detector only slows it down.
const modelRounds = 2
