package main

import (
	"bytes"
	"net"
	"os"
	"testing"
	"time"

	"github.com/boardlink/boardlink/cmd/boardlink/internal/statusd"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"golang.org/x/sys/unix"
)

// TestStderrNobodyReads: programs whose standard error is full, or whose reader has left, work all the same, end cleanly by SIGHUP, and tell in
// their status how much of the log is lost.
func TestStderrNobodyReads(t *testing.T) {
	netnstest.Need(t)
	for _, left := range []bool{false, true} {
		name := "unread"
		if left {
			name = "left"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHand(t)
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			defer w.Close()
			if left {
				r.Close()
			} else {
				fd := int(w.Fd()) // which makes it a blocking one
				unix.SetNonblock(fd, true)
				for err = nil; err == nil; {
					_, err = unix.Write(fd, bytes.Repeat([]byte{'\n'}, 4096))
				}
				unix.SetNonblock(fd, false)
			}
			h.stderr = w
			for _, s := range sides {
				h.begin(s)
			}
			h.waitUp()
			h.ping()
			if left {
				p, err := statusd.Get(t.Context(), h.path("host.sock"))
				if err != nil || p.LogLost == 0 {
					t.Errorf("status tells of %d lost lines of the log, %v", p.LogLost, err)
				}
			}
			for _, s := range []string{"agent", "host", "serve"} {
				if code := h.p[s].end(unix.SIGHUP, 5*time.Second); code != 0 {
					t.Errorf("the %s ends with status %d (%v)", s, code, h.p[s].cmd.ProcessState)
				}
			}
		})
	}
}

// TestTamperedBells: a client of the rendezvous that makes the doorbells of both ends block, under traffic, keeps neither from ending cleanly by
// SIGTERM; the status tells what it did.
func TestTamperedBells(t *testing.T) {
	netnstest.Need(t)
	for _, fill := range []bool{true, false} {
		name := "drained"
		if fill {
			name = "filled"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHand(t)
			for _, s := range sides {
				h.begin(s)
			}
			h.waitUp()
			h.ping()
			fds := peer.Bells(t, h.path("b"), 16)
			stop := peer.Tamper(fds, fill)
			defer stop()
			blocked := func() (n uint64) {
				for _, d := range h.status("host").Devices {
					for _, q := range d.Queues {
						n += q.Pump["ring_blocked"]
					}
				}
				return n
			}
			send := func() {
				err := h.ns.Do(func() error {
					c, err := net.Dial("udp", "10.9.0.2:9")
					if err != nil {
						return err
					}
					defer c.Close()
					for range 50 {
						c.Write([]byte("x")) // refused while the carrier is off
						time.Sleep(time.Millisecond)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
			send()
			defer h.p["agent"].cmd.Process.Signal(unix.SIGCONT) // also where the test fails
			if fill {
				// An agent that takes no ring, if it was waiting for one when it was stopped.
				until(t, 30*time.Second, "a blocked ring shows in the status", func() bool {
					h.p["agent"].cmd.Process.Signal(unix.SIGCONT)
					time.Sleep(100 * time.Millisecond)
					h.p["agent"].cmd.Process.Signal(unix.SIGSTOP)
					for range 5 {
						if send(); blocked() > 0 {
							return true
						}
					}
					return false
				})
			}
			h.stop("host")
			h.p["agent"].cmd.Process.Signal(unix.SIGCONT)
			h.stop("agent")
		})
	}
}
