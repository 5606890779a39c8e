package echo_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/hwtest/echo"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/session"
)

// plan makes echo devices for package app.
type plan struct{ drv *echo.Driver }

func (plan) Model(uint16) (device.Device, error) { return &echo.Device{}, nil }

func (p plan) Driver(n uint16) (driver.Driver, error) {
	p.drv.Dev = n
	return p.drv, nil
}

// A device model that is new to package app takes one line there, on host and agent: an element of the list of device types.
func TestDeviceType(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	srv, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 1 << 20, Vectors: 2})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve() }()
	t.Cleanup(func() { srv.Close(); <-served })
	drv := &echo.Driver{Key: 9}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	var log peer.Log
	for _, side := range []board.Side{board.Host, board.Agent} {
		c := app.New(side)
		if err := c.Parse([]string{"--board", "loopback:" + path, "--status", "none"}); err != nil {
			t.Fatal(err)
		}
		c.Nets = nil // which would need an interface
		c.Types = append(c.Types, app.DeviceType{Name: "echo", Plan: func(*app.Config, int, session.Logger) ([]app.Plan, error) {
			return []app.Plan{plan{drv}}, nil
		}})
		go func() { done <- app.Run(ctx, c, "test", &log) }()
	}
	e := &ends{t: t}
	e.echoes(drv, 50)
	cancel()
	for range 2 {
		if err := <-done; err != nil {
			t.Errorf("%v; log:\n%s", err, &log)
		}
	}
	if drv.Dev != 0 {
		t.Errorf("device number %d, want 0: there is no other device", drv.Dev)
	}
}
