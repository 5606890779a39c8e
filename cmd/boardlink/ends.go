package main

import (
	"errors"

	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/app/daemon"
	"github.com/boardlink/boardlink/board"
)

// hostCmd and agentCmd leave their flags to app, which boardlink-host and boardlink-agent share.
type (
	hostCmd struct {
		Args []string `arg:"" optional:"" help:"Flags: see boardlink host --help."`
	}
	agentCmd struct {
		Args []string `arg:"" optional:"" help:"Flags: see boardlink agent --help."`
	}
)

func (c *hostCmd) Run(s *streams) error  { return runEnd(board.Host, c.Args, s) }
func (c *agentCmd) Run(s *streams) error { return runEnd(board.Agent, c.Args, s) }

func runEnd(side board.Side, args []string, s *streams) error {
	c := app.New(side)
	if err := c.Parse(args); errors.Is(err, app.ErrHelp) {
		return app.WriteHelp(s.out, side, "boardlink "+side.String())
	} else if err != nil {
		return err
	}
	c.LogLost = daemon.Stderr().Lost
	ctx, stop := daemon.Context(daemon.Stderr())
	defer stop()
	return app.Run(ctx, c, version(), s.logger(c.Verbose))
}
