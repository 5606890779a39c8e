//go:build !race

package vring

// RaceEnabled tells the tests that all is ten times slower.
const RaceEnabled = false
