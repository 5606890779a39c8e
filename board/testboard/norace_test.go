//go:build !race

package testboard_test

const raceFactor = 1
