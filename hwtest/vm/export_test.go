package vm

import "testing"

// FakeMirrors makes Fetch take archives without a signature, and give them no second chance, while the test runs.
func FakeMirrors(t *testing.T) {
	n := retries
	trustAll, retries = true, 0
	t.Cleanup(func() { trustAll, retries = false, n })
}

// CompareVersions is for tests.
var CompareVersions = compareVersions
