//go:build linux

package traffic

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Direction is the way that data takes over the link.
type Direction uint8

const (
	// BoardToHost is from the board to its carrier.
	BoardToHost Direction = iota
	// HostToBoard is from the carrier to the board.
	HostToBoard
)

// String returns "board to host" or "host to board".
func (d Direction) String() string {
	if d == BoardToHost {
		return "board to host"
	}
	return "host to board"
}

// Result is the summary of a run, in the form that JSON shows. Fill it with the Add methods, which
// keep the figures in it up to date.
type Result struct {
	Ping      PingCounts `json:"ping"`
	RTT       RTT        `json:"rtt_us"`     // of all pings
	TCPGbps   BothWays   `json:"tcp_gbps"`   // payload
	UDP64Kpps BothWays   `json:"udp64_kpps"` // packets received intact, in thousands a second
	Corrupt   uint64     `json:"corrupt"`    // bytes of TCP, packets of UDP and ICMP, see package traffic

	hist *hdrhistogram.Histogram
	tcp  [2]struct{ bits, seconds float64 }
	udp  [2]struct{ packets, seconds float64 }
}

// PingCounts sums up the pings.
type PingCounts struct {
	Sent       int `json:"sent"`
	Received   int `json:"received"`
	Lost       int `json:"lost"`
	Duplicates int `json:"duplicates"`
}

// BothWays is a figure for each direction.
type BothWays struct {
	BoardToHost float64 `json:"board_to_host"`
	HostToBoard float64 `json:"host_to_board"`
}

func (b *BothWays) set(d Direction, v float64) {
	if d == BoardToHost {
		b.BoardToHost = v
		return
	}
	b.HostToBoard = v
}

// AddPing adds a run of Ping.
func (r *Result) AddPing(p PingResult) {
	r.Ping.Sent += p.Sent
	r.Ping.Received += p.Received
	r.Ping.Lost += p.Lost
	r.Ping.Duplicates += p.Duplicates
	r.Corrupt += p.Corrupt
	if p.hist == nil {
		return
	}
	if r.hist == nil {
		r.hist = newHist()
	}
	r.hist.Merge(p.hist)
	r.RTT = rttOf(r.hist)
}

// AddTCP adds a run of TCP; several in a direction give the mean over their time.
func (r *Result) AddTCP(d Direction, t TCPResult) {
	r.Corrupt += t.Corrupt
	s := &r.tcp[d]
	s.bits += float64(t.Bytes) * 8
	s.seconds += t.Seconds
	if s.seconds > 0 {
		r.TCPGbps.set(d, s.bits/s.seconds/1e9)
	}
}

// AddUDP adds a run of UDP with 64 bytes of payload; several in a direction give the mean over
// their time.
func (r *Result) AddUDP(d Direction, u UDPResult) {
	r.Corrupt += u.Corrupt
	if u.KppsReceived <= 0 {
		return
	}
	s := &r.udp[d]
	s.packets += float64(u.Received)
	s.seconds += float64(u.Received) / u.KppsReceived / 1e3
	r.UDP64Kpps.set(d, s.packets/s.seconds/1e3)
}

// OK reports whether every ping was answered and nothing was corrupt.
func (r *Result) OK() bool {
	return r.Ping.Sent > 0 && r.Ping.Lost == 0 && r.Corrupt == 0
}

// Pair is a path between the two ends of a link, of one family of addresses.
type Pair struct {
	Board, Host Endpoint
}

// ends returns where a direction starts and where it ends.
func (p Pair) ends(d Direction) (from, to Endpoint) {
	if d == BoardToHost {
		return p.Board, p.Host
	}
	return p.Host, p.Board
}

// RunConfig says what Run does. The zero value of a field stands for its default.
type RunConfig struct {
	Duration time.Duration // of each of the measurements, TCP and UDP, each way; default 3 s
	Ping     PingConfig    // for each pair, each way, without Peer; the default also has sizes of 0 to 1400 bytes
	TCP      TCPConfig     // without Duration
	UDP      UDPConfig     // without Duration, Size
	Ready    time.Duration // how long the path may take to come up; default 10 s
	// Step is told what starts, for instance "ping 10.0.0.1 to 10.0.0.2"; may be nil.
	Step func(string)
}

// Run shows that a link works: waits until the ends of each pair reach each other, pings both
// ways, sends TCP both ways, then UDP packets of 64 bytes both ways. The pairs (one of IPv4, one
// of IPv6, say) share the duration. It goes on after loss and corruption, which the result counts,
// and returns all errors as one of one line; when ctx ends, with what was measured until then.
func Run(ctx context.Context, pairs []Pair, cfg RunConfig) (Result, error) {
	var r Result
	if len(pairs) == 0 {
		return r, errors.New("traffic: no pair of addresses to run between")
	}
	if cfg.Duration == 0 {
		cfg.Duration = 3 * time.Second
	}
	if cfg.Ready == 0 {
		cfg.Ready = 10 * time.Second
	}
	if len(cfg.Ping.Sizes) == 0 {
		cfg.Ping.Sizes = []int{56, 0, 1, 999, 1400}
	}
	share := cfg.Duration / time.Duration(len(pairs))
	cfg.TCP.Duration, cfg.UDP.Duration, cfg.UDP.Size = share, share, 64

	for _, p := range pairs {
		if err := checkEnds(p.Board, p.Host); err != nil {
			return r, err
		}
		for _, d := range []Direction{BoardToHost, HostToBoard} {
			from, to := p.ends(d)
			wctx, cancel := context.WithTimeout(ctx, cfg.Ready)
			err := WaitReachable(wctx, from.NS, to.Addr)
			cancel()
			if err != nil {
				return r, fmt.Errorf("%v: %w", d, err)
			}
		}
	}
	var errs []error
	for _, what := range []string{"ping", "tcp", "udp"} {
		for _, d := range []Direction{BoardToHost, HostToBoard} {
			for _, p := range pairs {
				from, to := p.ends(d)
				if cfg.Step != nil {
					cfg.Step(fmt.Sprintf("%s %v to %v", what, from, to))
				}
				var err error
				switch what {
				case "ping":
					var res PingResult
					cfg.Ping.Peer = to.NS
					res, err = Ping(ctx, from.NS, to.Addr, cfg.Ping)
					r.AddPing(res)
				case "tcp":
					var res TCPResult
					res, err = TCP(ctx, from, to, cfg.TCP)
					r.AddTCP(d, res)
				case "udp":
					var res UDPResult
					res, err = UDP(ctx, from, to, cfg.UDP)
					r.AddUDP(d, res)
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("%v: %w", d, err))
				}
				if ctx.Err() != nil {
					if err == nil {
						errs = append(errs, ctxErr(ctx, "traffic")) // cut off between two measurements
					}
					return r, oneLine(errs)
				}
			}
		}
	}
	return r, oneLine(errs)
}
