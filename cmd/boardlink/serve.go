package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/boardlink/boardlink/app/daemon"
	"github.com/boardlink/boardlink/board/loopback"
)

type serveCmd struct {
	Path    string `arg:"" help:"Socket to serve, e.g. /run/a.sock."`
	Size    string `default:"16M" help:"Size of the shared memory: a power of two, with K, M or G."`
	Vectors int    `default:"8" help:"Doorbells of each end: 2 N + 2 give each queue of a device of N pairs its own."`
	Mode    string `default:"0600" help:"Permissions of the socket, octal."`
	Verbose bool   `short:"v" help:"Tell of clients that come and go."`
}

func (c *serveCmd) Run(s *streams) error {
	if c.Path == "" {
		return usagef("the path of the socket is empty: give one, e.g. /run/a.sock")
	}
	size, err := parseSize(c.Size)
	if err != nil {
		return err
	}
	mode, err := strconv.ParseUint(c.Mode, 8, 9)
	if err != nil {
		return usagef("--mode %s: three octal digits, e.g. 0660", c.Mode)
	}
	log := s.logger(c.Verbose)
	srv, err := loopback.NewServer(loopback.ServerConfig{Path: c.Path, Mode: os.FileMode(mode), Size: size, Vectors: c.Vectors,
		Logf: func(format string, args ...interface{}) {
			log.Debug(fmt.Sprintf(format, args...))
		},
		Warnf: func(format string, args ...interface{}) {
			log.Warn(fmt.Sprintf(format, args...))
		}})
	if err != nil {
		return err
	}
	log.Info("serving", "socket", c.Path, "size", size, "vectors", c.Vectors)
	ctx, stop := daemon.Context(daemon.Stderr())
	defer stop()
	done := make(chan error, 1)
	go func() { done <- srv.Serve() }()
	select {
	case <-ctx.Done():
		err = srv.Close()
		<-done
		return err
	case err = <-done:
		srv.Close()
		return err
	}
}

// parseSize reads a number of bytes.
func parseSize(s string) (int64, error) {
	shift, t := 0, strings.ToUpper(strings.TrimSuffix(strings.ToUpper(s), "IB"))
	for suffix, n := range map[string]int{"K": 10, "M": 20, "G": 30} {
		if strings.HasSuffix(t, suffix) {
			shift, t = n, strings.TrimSuffix(t, suffix)
		}
	}
	n, err := strconv.ParseInt(t, 10, 32)
	if err != nil || n <= 0 {
		return 0, usagef("%q is not a size: a number of bytes, with K, M or G, e.g. 16M", s)
	}
	return n << shift, nil
}
