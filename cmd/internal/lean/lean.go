// Package lean is what boardlink-agent and boardlink-host are made of: the two ends as small programs for
// machines that only gccgo compiles for (32-bit PowerPC, 64-bit PowerPC below POWER8), or that have no room for
// more. Flags, checks and what is built of them are package app's.
//
// It must not use anything beyond Go 1.18 without generics, the standard library and
// golang.org/x/sys/unix, nor the http and template packages that make a program large.
package lean

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/app/daemon"
	"github.com/boardlink/boardlink/board"
	_ "github.com/boardlink/boardlink/board/all" // every kind of board
)

// Version is what status tells of the program; the linker may set it:
// -ldflags '-X github.com/boardlink/boardlink/cmd/internal/lean.Version=...'.
var Version = "(devel)"

// Main runs the program of one side with the command line of the process, and ends the process.
func Main(side board.Side) {
	status := run(side, os.Args[1:], os.Stdout, daemon.Stderr())
	daemon.Stderr().Flush(daemon.FlushLimit)
	os.Exit(status)
}

func run(side board.Side, args []string, stdout, stderr io.Writer) int {
	program := "boardlink-" + side.String()
	c := app.New(side)
	err := app.CheckFiles()
	if err == nil {
		err = c.Parse(args)
	}
	if errors.Is(err, app.ErrHelp) {
		err = app.WriteHelp(stdout, side, program)
	} else if err == nil {
		version := Version + " lean " + runtime.Version() + " " + runtime.GOARCH
		c.LogLost = daemon.Stderr().Lost
		ctx, stop := daemon.Context(daemon.Stderr())
		err = app.Run(ctx, c, version, &Log{w: stderr, debug: c.Verbose})
		stop()
	}
	if err = app.ExplainFiles(err); err != nil {
		fmt.Fprintf(stderr, "%s: %s\n", program, app.OneLine(err))
	}
	return app.ExitStatus(err)
}
