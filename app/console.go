package app

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/console"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	consoledrv "github.com/boardlink/boardlink/driver/console"
	"github.com/boardlink/boardlink/session"
)

const (
	// consoleNumber is the device number of the first console of a link.
	consoleNumber = 64
	// maxConsoles is how many a link can have: then come the numbers of other types.
	maxConsoles = 16
	// maxConsoleName is the length of a console's name.
	maxConsoleName = 32
)

// Console is a console, as an operator describes it.
type Console struct {
	Name  string
	Board int // which of the boards it is for
	Class Class
	Pty   string // path of a link to a pseudo-terminal; "": none

	// The host's.
	Log        string // path of a file; "": none
	Scrollback int    // bytes; 0: the default

	// The agent's: one of these, or Pty.
	Exec []string
	Kmsg bool

	text string // as it was given
}

// setConsole is the set of --console.
func setConsole(c *Config, v string) error {
	n := Console{text: "--console " + v}
	for rest, more := v, true; more; {
		var kv string
		if kv, rest, more = rest, "", false; !strings.HasPrefix(kv, "exec=") { // which takes all that is left
			if i := strings.IndexByte(kv, ','); i >= 0 {
				kv, rest, more = kv[:i], kv[i+1:], true
			}
		}
		k, value := kv, ""
		if i := strings.IndexByte(kv, '='); i >= 0 {
			k, value = kv[:i], kv[i+1:]
		} else if kv != "kmsg" {
			return fmt.Errorf("%q is not KEY=VALUE", kv)
		}
		if err := n.set(c.Side, k, value); err != nil {
			return fmt.Errorf("%s: %v", k, err)
		}
	}
	c.Consoles = append(c.Consoles, n)
	return nil
}

func (n *Console) set(side board.Side, k, v string) (err error) {
	host := side == board.Host
	switch {
	case k == "kmsg" && !host:
		if v != "" {
			return errors.New("it has no value")
		}
		n.Kmsg = true
	case v == "":
		return errors.New("must not be empty")
	case k == "name":
		for _, r := range v {
			if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.') {
				return fmt.Errorf("%q: letters, digits, dots, hyphens and underscores are possible", v)
			}
		}
		if len(v) > maxConsoleName {
			return fmt.Errorf("%d characters: at most %d are possible", len(v), maxConsoleName)
		}
		n.Name = v
	case k == "pty":
		n.Pty = v
	case k == "class":
		err = n.Class.set(v)
	case k == "log" && host:
		n.Log = v
	case k == "scrollback" && host:
		bytes, err := parseBytes(v)
		if err != nil || bytes < console.MinScrollback || bytes > console.MaxScrollback {
			return fmt.Errorf("%q: %d to %d bytes are possible, also as 64K or 1M", v, console.MinScrollback, console.MaxScrollback)
		}
		n.Scrollback = int(bytes)
	case k == "board" && host:
		if n.Board, err = strconv.Atoi(v); err != nil || n.Board < 0 {
			return fmt.Errorf("%q is no number of a board: 0 is the first one", v)
		}
	case k == "exec" && !host:
		n.Exec, err = consoledrv.Words(v)
	case host:
		return errors.New("no such key; a host has name, log, scrollback, pty, class and board")
	default:
		return errors.New("no such key; an agent has name, pty, kmsg, class and exec")
	}
	return err
}

// checkConsoles gives consoles without a name one, and refuses what cannot be.
func (c *Config) checkConsoles() error {
	number := map[int]int{} // of consoles of a board
	names, paths := map[string]bool{}, map[string]string{}
	for i := range c.Consoles {
		n := &c.Consoles[i]
		if n.Board >= len(c.Boards) {
			return Usagef("%s: there is no board %d, only %d by --board", n.text, n.Board, len(c.Boards))
		}
		if isDoor(c.Boards[n.Board]) {
			return Usagef("%s: is for boards; vhost-user has one device for each socket, a network", n.text)
		}
		if n.Name == "" {
			n.Name = "con" + strconv.Itoa(number[n.Board])
		}
		if number[n.Board]++; number[n.Board] > maxConsoles {
			return Usagef("%s: a board has at most %d consoles", n.text, maxConsoles)
		}
		id := strconv.Itoa(n.Board) + "/" + n.Name
		if names[id] {
			return Usagef("%s: there are two consoles named %s", n.text, n.Name)
		}
		names[id] = true
		for _, p := range []string{n.Log, n.Pty} {
			if p != "" && paths[p] != "" {
				return Usagef("%s: %s is the console's named %s already", n.text, p, paths[p])
			} else if p != "" {
				paths[p] = n.Name
			}
		}
		if c.Side == board.Host {
			continue
		}
		ends := 0
		for _, is := range []bool{n.Pty != "", n.Kmsg, n.Exec != nil} {
			if is {
				ends++
			}
		}
		if ends != 1 {
			return Usagef("%s: say what it is joined to, by one of pty=PATH, kmsg, exec=COMMAND", n.text)
		}
	}
	return nil
}

// planConsoles is the console's DeviceType.Plan.
func planConsoles(c *Config, b int, log session.Logger) ([]Plan, error) {
	var plans []Plan
	for i := range c.Consoles {
		if n := &c.Consoles[i]; n.Board == b {
			plans = append(plans, &consolePlan{Console: n, c: c, log: log})
		}
	}
	return plans, nil
}

// consolePlan is a console as it is to be made.
type consolePlan struct {
	*Console
	c   *Config
	log session.Logger

	mu   sync.Mutex
	made *console.Console // the host's; nil: not made yet
}

func (p *consolePlan) class() (doorbell.Class, bool) { return p.Console.Class.class() }

// warnf logs what an operator has to know.
func (p *consolePlan) warnf(format string, args ...interface{}) {
	p.log.Warn(fmt.Sprintf(format, args...), "console", p.Name)
}

// Model implements Plan.
func (p *consolePlan) Model(number uint16) (device.Device, error) {
	d, err := console.New(console.Config{Name: p.Name, Number: number, Scrollback: p.Scrollback, Deny: p.c.Deny})
	if err != nil {
		return nil, err
	}
	if p.Log != "" {
		err = d.Log(p.Log, p.warnf)
	}
	if err == nil && p.Pty != "" {
		err = d.Terminal(p.Pty)
	}
	if err != nil {
		d.Close()
		return nil, Usagef("--console: %s: %w", p.Name, err)
	}
	p.mu.Lock()
	p.made = d
	p.mu.Unlock()
	return d, nil
}

// model returns the host's console, nil while it is not made.
func (p *consolePlan) model() *console.Console {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.made
}

// Driver implements Plan.
func (p *consolePlan) Driver(number uint16) (driver.Driver, error) {
	end, err := p.open()
	if err != nil {
		return nil, Usagef("--console: %s: %w", p.Name, err)
	}
	d, err := consoledrv.New(consoledrv.Config{Name: p.Name, Number: number, End: end, Deny: p.c.Deny})
	if err != nil {
		end.Close()
		return nil, err
	}
	return d, nil
}

// open opens what the board's console is joined to.
func (p *consolePlan) open() (end consoledrv.End, err error) {
	switch {
	case p.Kmsg:
		end, err = consoledrv.OpenKmsg()
	case p.Pty != "":
		end, err = consoledrv.OpenPty(p.Pty)
	default:
		end, err = consoledrv.StartCommand(p.Exec, p.warnf)
	}
	return end, err
}
