//go:build race

package testboard_test

// The race detector makes a run many times slower, and has little to see where one
// goroutine runs at a time.
const raceFactor = 10
