//go:build linux

// Package netnstest says what tests with interfaces of their own need of this machine.
package netnstest

import (
	"os"
	"testing"

	"github.com/boardlink/boardlink/trial/netns"
)

// Need ends the test where it may not make network namespaces and tap interfaces: in CI (CI=true) it fails, elsewhere
// it is skipped. The text names what is missing.
func Need(t testing.TB) {
	t.Helper()
	var why string
	switch err := netns.CheckTun(); {
	case netns.NeedsUser():
		why = "this test needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN), for network namespaces and interfaces"
	case err != nil:
		why = "this test needs tap interfaces: " + err.Error()
	default:
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}
