package app

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/entropy"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	entropydrv "github.com/boardlink/boardlink/driver/entropy"
	"github.com/boardlink/boardlink/session"
)

// rngNumber is the device number of the source of entropy. Networks count from 0. Both ends know the numbers, and with as many doorbell
// vectors as boards usually have (8, 16, 32) its queue shares none with the first network's.
const rngNumber = 100

// Rng is a source of entropy for a board, as an operator describes it.
type Rng struct {
	Rate   uint64        // the host's: bytes a second; 0: the default
	Credit int           // the agent's: bits of entropy that a byte counts for
	Every  time.Duration // the agent's: between two requests; 0: the default
	Board  int           // which of the boards it is for; -1: each of them has one
	Class  Class
	text   string // as it was given
}

// setRng is the set of --rng, which is a switch, or has keys.
func setRng(c *Config, v string) error {
	r := Rng{Board: -1, text: "--rng"}
	if on, err := parseBool(v); err == nil {
		if c.Rngs = nil; on {
			c.Rngs = []Rng{r}
		}
		return nil
	}
	r.text += "=" + v
	err := eachKey(v, func(k, v string) (err error) {
		switch {
		case k == "rate" && c.Side == board.Host:
			if r.Rate, err = parseBytes(v); err != nil || r.Rate < entropy.MinRate || r.Rate > entropy.MaxRate {
				return fmt.Errorf("%q: %d to %d bytes a second are possible, also as 64K or 1M", v, entropy.MinRate, entropy.MaxRate)
			}
		case k == "class":
			return r.Class.set(v)
		case k == "board" && c.Side == board.Host:
			if r.Board, err = strconv.Atoi(v); err != nil || r.Board < 0 {
				return fmt.Errorf("%q is no number of a board: 0 is the first one", v)
			}
		case k == "credit" && c.Side == board.Agent:
			if r.Credit, err = strconv.Atoi(v); err != nil || r.Credit < 0 || r.Credit > entropydrv.MaxCredit {
				return fmt.Errorf("%q: 0 to %d bits a byte are possible", v, entropydrv.MaxCredit)
			}
		case k == "every" && c.Side == board.Agent:
			if r.Every, err = time.ParseDuration(v); err != nil || r.Every < time.Millisecond {
				return fmt.Errorf("%q is no time of at least 1ms, e.g. 30s", v)
			}
		case c.Side == board.Host:
			return fmt.Errorf("no such key; a host has rate, board and class")
		default:
			return fmt.Errorf("no such key; an agent has credit, every and class")
		}
		return nil
	})
	c.Rngs = append(c.Rngs, r)
	return err
}

// checkRngs refuses sources of entropy for boards that there are not, and two of one board.
func (c *Config) checkRngs() error {
	seen := map[int]bool{}
	for i := range c.Rngs {
		r := &c.Rngs[i]
		if r.Board >= len(c.Boards) {
			return Usagef("%s: there is no board %d, only %d by --board", r.text, r.Board, len(c.Boards))
		}
		taken := false
		for b := range c.Boards {
			if !r.of(c, b) {
				continue
			}
			if seen[b] {
				return Usagef("%s: board %d has one already", r.text, b)
			}
			seen[b], taken = true, true
		}
		if !taken {
			return Usagef("%s: is for boards; a front end of vhost-user has one device for each socket: board=N makes it the source of entropy", r.text)
		}
	}
	return nil
}

// of tells whether it is for board b. Of a front end it is the only device, so that has to be asked for.
func (r *Rng) of(c *Config, b int) bool {
	return r.Board == b || r.Board < 0 && !isDoor(c.Boards[b])
}

// planRngs is the entropy device's DeviceType.Plan.
func planRngs(c *Config, b int, _ session.Logger) ([]Plan, error) {
	var plans []Plan
	for i := range c.Rngs {
		if r := &c.Rngs[i]; r.of(c, b) {
			plans = append(plans, &rngPlan{r, c})
		}
	}
	return plans, nil
}

// rngPlan is an entropy device as it is to be made.
type rngPlan struct {
	*Rng
	c *Config
}

func (p *rngPlan) class() (doorbell.Class, bool) { return p.Rng.Class.class() }

// Model implements Plan.
func (p *rngPlan) Model(number uint16) (device.Device, error) {
	return entropy.New(entropy.Config{Name: "rng0", Number: number, Rate: p.Rate, Deny: p.c.Deny})
}

// Driver implements Plan.
func (p *rngPlan) Driver(number uint16) (driver.Driver, error) {
	d, err := entropydrv.New(entropydrv.Config{Name: "rng0", Number: number, Credit: p.Credit, Interval: p.Every, Deny: p.c.Deny})
	if err != nil {
		return nil, Usagef("%s: %w", p.text, err)
	}
	return d, nil
}

// eachKey calls f for each KEY=VALUE of text, which are separated by commas.
func eachKey(text string, f func(k, v string) error) error {
	for _, kv := range strings.Split(text, ",") {
		i := strings.IndexByte(kv, '=')
		if i < 0 {
			return fmt.Errorf("%q is not KEY=VALUE", kv)
		}
		if err := f(kv[:i], kv[i+1:]); err != nil {
			return fmt.Errorf("%s: %v", kv[:i], err)
		}
	}
	return nil
}

// parseBytes reads a number of bytes, with K, M or G behind it for 1024 and its powers.
func parseBytes(v string) (uint64, error) {
	shift := uint(0)
	if v != "" {
		if i := strings.IndexByte("KMG", v[len(v)-1]); i >= 0 {
			shift, v = 10*uint(i+1), v[:len(v)-1]
		}
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil || n > 1<<62>>shift {
		return 0, fmt.Errorf("%q is no number of bytes", v)
	}
	return n << shift, nil
}
