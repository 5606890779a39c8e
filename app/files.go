package app

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// MinFiles is how many open files a program needs to start: less, and Go's own runtime ends it without a
// word that an operator understands. An end of a link with one device takes about 31, and 4 for each
// queue pair after the first.
const MinFiles = 32

// CheckFiles raises this process's limit of open files (RLIMIT_NOFILE) as far as it may, and returns
// a UsageError where it is below MinFiles. Call it first in main.
func CheckFiles() error {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil {
		return nil
	}
	if l.Cur < l.Max {
		old := l.Cur
		if l.Cur = l.Max; unix.Setrlimit(unix.RLIMIT_NOFILE, &l) != nil {
			l.Cur = old
		}
	}
	if l.Cur < MinFiles {
		return Usagef("the limit of open files (RLIMIT_NOFILE) is %d, at least %d are needed: raise it (ulimit -n 1024; LimitNOFILE= in a systemd unit)", l.Cur, MinFiles)
	}
	return nil
}

// ExplainFiles makes an error of a process or machine that is out of file descriptors a UsageError that
// tells how to raise the limit. It returns every other error, and nil, as they are.
func ExplainFiles(err error) error {
	switch {
	case errors.Is(err, unix.EMFILE):
		var l unix.Rlimit
		_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &l)
		return UsageError{fmt.Errorf("%w; the limit (RLIMIT_NOFILE) is %d: raise it (ulimit -n 1024; LimitNOFILE= in a systemd unit)", err, l.Cur)}
	case errors.Is(err, unix.ENFILE):
		return UsageError{fmt.Errorf("%w; the limit of the whole machine is reached: raise the sysctl fs.file-max", err)}
	}
	return err
}
