// Command boardlink gives PCI(e) boards an ordinary network interface to their carrier, by virtio
// across the bus in user space. See README.md, and `boardlink --help`.
package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/alecthomas/kong"
	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/app/daemon"
	"github.com/boardlink/boardlink/bench/benchkit"
	_ "github.com/boardlink/boardlink/board/all" // every kind of board
	"github.com/boardlink/boardlink/tunbridge"
)

const (
	exitOK    = app.ExitOK
	exitFail  = app.ExitFail
	exitUsage = app.ExitUsage
)

type cli struct {
	Loopback loopbackCmd     `cmd:"" help:"Try it here: both ends on this machine, with real traffic between two namespaces."`
	Host     hostCmd         `cmd:"" passthrough:"" help:"The carrier's end: offers network devices to a board."`
	Agent    agentCmd        `cmd:"" passthrough:"" help:"The board's end: drives the devices that the host offers."`
	Serve    serveCmd        `cmd:"" help:"The rendezvous of a loopback board (an ivshmem server: QEMU can be either end)."`
	Probe    probeCmd        `cmd:"" help:"PCI functions that could be boards, and what is missing to use them."`
	Check    checkCmd        `cmd:"" help:"Check a file that describes a board, without the board; samples to start from."`
	Doctor   doctorCmd       `cmd:"" help:"Try a board: driver, IOMMU, window, doorbells, with latencies."`
	Bench    benchCmd        `cmd:"" help:"Measure a board."`
	Console  consoleCmd      `cmd:"" help:"Attach a terminal to a board's console; list consoles."`
	Status   statusCmd       `cmd:"" help:"State, features, queues and counters of running ends."`
	VhostNet vhostUserNetCmd `cmd:"" name:"vhost-user-net" passthrough:"" help:"A host for one vhost-user front end, with the flags that QEMU's conventions give back ends."`
	Version  versionCmd      `cmd:"" help:"Print the version."`
}

// usageError is the user's fault, in one line: app.UsageError in short.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return app.UsageError{Err: e.err} }

func usagef(format string, args ...any) error { return app.Usagef(format, args...) }

// statusError has been reported already; only the exit status is left.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func exitStatus(err error) int {
	var st statusError
	if errors.As(err, &st) {
		return int(st)
	}
	return app.ExitStatus(err)
}

func main() {
	if err := app.CheckFiles(); err != nil {
		fmt.Fprintln(os.Stderr, "boardlink:", err)
		os.Exit(exitStatus(err))
	}
	benchkit.Peer()           // this program is the other side of its benchmarks
	log.SetOutput(io.Discard) // net/http's: what strangers answer is told in our own words
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	var c cli
	exited := -1
	p, err := kong.New(&c, kong.Name("boardlink"),
		kong.Description("An ordinary network interface between PCI(e) boards and their carrier: virtio across the bus, in user space."),
		kong.UsageOnError(), kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
		vars(), kong.Writers(stdout, stderr), kong.Exit(func(code int) { exited = code }))
	if err != nil {
		fmt.Fprintln(stderr, "boardlink:", err)
		return exitFail
	}
	if len(args) == 0 {
		args = []string{"--help"}
	}
	ctx, err := p.Parse(args)
	if exited >= 0 {
		return exited
	}
	if err != nil {
		fmt.Fprintf(stderr, "boardlink: %s (see boardlink --help)\n", oneLine(err))
		return exitUsage
	}
	name, _, _ := strings.Cut(ctx.Command(), " ") // without the arguments' names
	if name == "host" || name == "agent" || name == "vhost-user-net" {
		c.Host.Args, c.Agent.Args, c.VhostNet.Args = args[1:], args[1:], args[1:] // as they were typed: the parser alters what is not UTF-8
	}
	if longRunning[name] && stderr == io.Writer(os.Stderr) {
		defer daemon.Stderr().Flush(daemon.FlushLimit)
		stderr = daemon.Stderr()
	}
	err = app.ExplainFiles(ctx.Run(&streams{stdout, stderr}))
	var st statusError
	if err != nil && !errors.As(err, &st) {
		fmt.Fprintf(stderr, "boardlink %s: %s\n", name, oneLine(err))
	}
	return exitStatus(err)
}

// vars are what the help of flags refers to.
func vars() kong.Vars {
	return kong.Vars{"samples": sampleNames(), "status_dir": app.StatusDir(), "max_queues": strconv.Itoa(tunbridge.MaxQueues)}
}

func oneLine(err error) string { return app.OneLine(err) }

// longRunning are the commands that a standard error which nobody reads must not hold up.
var longRunning = map[string]bool{"host": true, "agent": true, "serve": true, "vhost-user-net": true}

type streams struct{ out, err io.Writer }

// logger writes to standard error: what an operator has to know, with verbose everything.
func (s *streams) logger(verbose bool) *slog.Logger {
	level := slog.LevelInfo
	if verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(s.err, &slog.HandlerOptions{Level: level}))
}

type versionCmd struct{}

func (versionCmd) Run(s *streams) error {
	fmt.Fprintln(s.out, "boardlink", version())
	return nil
}

// version returns what the build knows of itself.
func version() string {
	bi, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := bi.Main.Version
	for _, kv := range bi.Settings {
		if kv.Key == "vcs.revision" && (v == "" || v == "(devel)") && len(kv.Value) >= 12 {
			v = kv.Value[:12]
		}
	}
	if v == "" {
		v = "(devel)"
	}
	return v + " " + bi.GoVersion
}
