//go:build linux

package netbench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/trial/traffic"
	"golang.org/x/sys/unix"
)

const (
	pingPayload = 56 // bytes, as ping(8)
	pingHeader  = 8  // ICMP echo, RFC 792
	pingTimeout = time.Second
)

// pings are the round trips of one run.
type pings struct {
	rtt  []time.Duration // sorted
	lost int
}

// quantile returns a quantile in microseconds.
func (p *pings) quantile(q float64) float64 {
	if len(p.rtt) == 0 {
		return 0
	}
	i := min(int(q*float64(len(p.rtt))), len(p.rtt)-1)
	return float64(p.rtt[i]) / 1e3
}

// ping sends echo requests for a time, the next one an interval after the last, and when that is answered at the earliest. One
// thread sends and waits, as ping(8) does: the wake-up of it is in each round trip. Between an answer and the next request it sleeps, or
// stays awake, as ping(8) does for less than 10 ms: then its processor does not fall asleep either.
func ping(ctx context.Context, from, to traffic.Endpoint, interval, d time.Duration, awake bool) (*pings, error) {
	var fd int
	err := from.NS.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP); err != nil {
			return err
		}
		if err = limit(fd, blastTick); err == nil {
			err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr.As4()})
		}
		if err != nil {
			unix.Close(fd)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("ping %v: %w", to, err)
	}
	defer unix.Close(fd)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// This thread's sleeps end when they should. Where it cannot be set they are 50 us longer.
	if old, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0); err == nil {
		unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
		defer unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(old), 0, 0, 0)
	}
	var id [2]byte
	if _, err := unix.Getrandom(id[:], 0); err != nil {
		return nil, err
	}
	p := new(pings)
	var req [pingHeader + pingPayload]byte
	req[0] = 8 // echo request
	copy(req[4:], id[:])
	var in [256]byte
	begin := time.Now()
	for seq, at := uint16(0), begin; ; seq++ {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		for awake && time.Until(at) > 0 {
			unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
		if wait := time.Until(at); wait > 0 {
			ts := unix.NsecToTimespec(int64(wait))
			unix.Nanosleep(&ts, nil) // sooner after a signal: no harm
		}
		if time.Since(begin) >= d {
			break
		}
		binary.BigEndian.PutUint16(req[6:], seq)
		binary.BigEndian.PutUint16(req[2:], 0)
		binary.BigEndian.PutUint16(req[2:], inetSum(req[:]))
		sent := time.Now()
		at = sent.Add(interval)
		if _, err := unix.Write(fd, req[:]); err != nil {
			return nil, fmt.Errorf("ping %v: %w", to, err)
		}
		rtt, err := answered(ctx, fd, in[:], id, seq, sent)
		if err != nil {
			return nil, fmt.Errorf("ping %v: %w", to, err)
		}
		if rtt == 0 {
			p.lost++
			continue
		}
		p.rtt = append(p.rtt, rtt)
	}
	slices.Sort(p.rtt)
	return p, nil
}

// answered waits for the answer to a request; 0 is none within the timeout.
func answered(ctx context.Context, fd int, in []byte, id [2]byte, seq uint16, sent time.Time) (time.Duration, error) {
	for {
		// The runtime does not hear of it: it would wake a thread of its own behind the answer, and before the clock is read.
		r, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&in[0])), uintptr(len(in)))
		now := time.Since(sent)
		if errno != 0 {
			if !again(errno) {
				return 0, errno
			}
			if now >= pingTimeout || ctx.Err() != nil {
				return 0, nil
			}
			continue
		}
		b := in[:r] // with its IP header
		if len(b) < 20 || len(b) < int(b[0]&15)*4+pingHeader {
			continue
		}
		b = b[int(b[0]&15)*4:]
		if b[0] == 0 && b[1] == 0 && b[4] == id[0] && b[5] == id[1] && binary.BigEndian.Uint16(b[6:]) == seq {
			return now, nil
		}
		if now >= pingTimeout {
			return 0, errors.New("other answers keep coming")
		}
	}
}

// inetSum is the checksum of RFC 1071 over an even number of bytes.
func inetSum(b []byte) uint16 {
	var s uint32
	for i := 0; i < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}
