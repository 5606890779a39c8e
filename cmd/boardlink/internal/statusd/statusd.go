// Package statusd asks running hosts and agents: for their status, JSON over HTTP on a unix socket, and, on the same socket, for what
// package ctl has. app.ServeControl serves it.
//
// It must not know what a status says (package status), or how it is printed.
package statusd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/status"
)

// What errors of Get match (errors.Is).
var (
	// ErrNobody: the socket is not there, or left by a program that has ended.
	ErrNobody = errors.New("no program listens there")
	// ErrDenied: this user may not ask.
	ErrDenied = errors.New("permission denied")
)

// noDeadline takes a deadline away.
var noDeadline time.Time

// explain returns the error of a connection that cannot be made.
func explain(path string, err error) error {
	for _, e := range []error{syscall.ENOENT, syscall.ECONNREFUSED} {
		if errors.Is(err, e) {
			return fmt.Errorf("%s: %w: is it running, and with this --status?", path, ErrNobody)
		}
	}
	if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("%s: %w: ask as the user of that program, or as root", path, ErrDenied)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// Get asks the program at path.
func Get(ctx context.Context, path string) (status.Program, error) {
	var p status.Program
	c := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, "GET", "http://boardlink/status", nil)
	if err != nil {
		return p, err
	}
	resp, err := c.Do(req)
	if err != nil {
		if e := explain(path, err); errors.Is(e, ErrNobody) || errors.Is(e, ErrDenied) {
			return p, e
		}
		if ctx.Err() != nil {
			return p, fmt.Errorf("%s: no answer: %w", path, ctx.Err())
		}
		return p, fmt.Errorf("%s: what listens there does not speak HTTP: no boardlink program", path)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return p, fmt.Errorf("%s: answers %s: no boardlink program", path, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 16<<20)).Decode(&p); err != nil {
		return p, fmt.Errorf("%s: not the status of a boardlink program: %w", path, err)
	}
	return p, nil
}
