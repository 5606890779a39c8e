package session

import "time"

// Tests do not wait long for a board that cannot be opened.
func init() { retryOpen, maxRetryOpen = 5*time.Millisecond, 20*time.Millisecond }
