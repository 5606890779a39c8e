package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/board"
)

// vhostUserNetCmd is a host with one vhost-user socket, started as QEMU's documentation has it for back ends
// (docs/interop/vhost-user.rst, "Backend program conventions").
type vhostUserNetCmd struct {
	Args []string `arg:"" optional:"" help:"Flags: see boardlink vhost-user-net --help."`
}

const vhostUserNetHelp = `usage: boardlink vhost-user-net --socket-path=PATH | --fd=N | --print-capabilities  [flags of boardlink host]

A network device for one vhost-user front end, started as programs that run QEMU start back ends: boardlink
host --board vhost-user:PATH, or vhost-user:fd=N.

  --socket-path=PATH     make this socket and wait for the front end
  --fd=N                 a connected socket, or one that listens, that this program was given
  --print-capabilities   print what this program can as JSON, and end

All other flags are those of boardlink host, but for --board (see boardlink host --help).
`

// Run runs a host with the socket as its board.
func (c *vhostUserNetCmd) Run(s *streams) error {
	args, print, err := hostArgs(c.Args)
	switch {
	case errors.Is(err, app.ErrHelp):
		_, err = fmt.Fprint(s.out, vhostUserNetHelp)
		return err
	case err != nil:
		return err
	case print:
		_, err = fmt.Fprintln(s.out, `{"type": "net"}`)
		return err
	}
	return runEnd(board.Host, args, s)
}

// hostArgs turns the flags of the conventions into those of a host. print: only the capabilities are asked for.
func hostArgs(args []string) (host []string, print bool, err error) {
	spec := ""
	for i := 0; i < len(args); i++ {
		name, value, given := strings.Cut(args[i], "=")
		switch name {
		case "--help", "-h":
			return nil, false, app.ErrHelp
		case "--print-capabilities":
			if given {
				return nil, false, usagef("--print-capabilities takes no value")
			}
			print = true
			continue
		case "--board", "-b":
			return nil, false, usagef("--board: not here; the socket is given by --socket-path or --fd (boardlink host takes boards)")
		case "--socket-path", "--fd":
		default:
			host = append(host, args[i])
			continue
		}
		if !given {
			if i++; i == len(args) {
				return nil, false, usagef("%s: a value is missing", name)
			}
			value = args[i]
		}
		if spec != "" {
			return nil, false, usagef("%s: --socket-path or --fd is given once", name)
		}
		if name == "--fd" {
			if n, err := strconv.Atoi(value); err != nil || n < 0 {
				return nil, false, usagef("--fd %s: the number of an open descriptor is needed", value)
			}
			value = "fd=" + value
		} else if strings.HasPrefix(value, "fd=") {
			value = "./" + value // a path, though --board would take it for a descriptor
		} else if value == "" || strings.Contains(value, ",") {
			return nil, false, usagef("--socket-path %q: a path without commas is needed", value)
		}
		spec = "vhost-user:" + value
	}
	if print {
		return nil, true, nil
	}
	if spec == "" {
		return nil, false, usagef("--socket-path=PATH or --fd=N is needed")
	}
	return append([]string{"--board", spec}, host...), false, nil
}
