//go:build race

package vring

// raceEnabled tells that the race detector watches: words that both sides access are then accessed
// atomically.
const raceEnabled = true
