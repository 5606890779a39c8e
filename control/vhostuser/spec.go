package vhostuser

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Prefix is what the spec of a door begins with, where a board's begins with its kind.
const Prefix = "vhost-user:"

// Help describes the spec of a door.
const Help = "vhost-user:PATH[,client][,mode=0660][,queues=N][,slots=off][,status=off], or vhost-user:fd=N with the last three"

// FrontendHelp describes the spec of a front end.
const FrontendHelp = "vhost-user:PATH[,server][,mode=0660], or vhost-user:fd=N"

// maxPath is the longest path of a Unix socket: sun_path of unix(7) less its zero byte.
const maxPath = 107

// maxPairs is how many queue pairs a spec may ask for: SET_VRING_KICK has 8 bits for the number of
// a queue.
const maxPairs = 128

// Spec says where a door's socket is.
type Spec struct {
	// Path is the socket's; empty where FD is given.
	Path string
	// FD is an open socket: one that listens, or is connected to a front end; -1: none.
	FD int
	// Client: connect to Path, where the front end listens. Else listen there.
	Client bool
	// Mode is the permissions of a socket that listens; 0: 0600.
	Mode os.FileMode
	// Queues is how many queue pairs a network device has; 0: as it is described elsewhere.
	Queues int
	// NoSlots: CONFIGURE_MEM_SLOTS is not offered, so the front end sends whole memory tables.
	NoSlots bool
	// NoStatus: STATUS is not offered, so the front end does not send the device status.
	NoStatus bool
}

// without returns the protocol features that are not to be offered.
func (s Spec) without() (bits uint64) {
	if s.NoSlots {
		bits |= protoMemSlots
	}
	if s.NoStatus {
		bits |= protoStatus
	}
	return bits
}

// ParseSpec reads the spec of a door, "vhost-user:PATH,...". Errors are the user's, in one line.
func ParseSpec(s string) (Spec, error) { return parseSpec(s, false) }

// ParseFrontendSpec reads the spec of a front end: it connects unless it is told to be the server.
func ParseFrontendSpec(s string) (Spec, error) { return parseSpec(s, true) }

func parseSpec(s string, front bool) (Spec, error) {
	spec, help := Spec{FD: -1}, Help
	if front {
		help = FrontendHelp
	}
	bad := func(format string, args ...interface{}) (Spec, error) {
		return Spec{}, fmt.Errorf("%s: %s; it is %s", s, fmt.Sprintf(format, args...), help)
	}
	if !strings.HasPrefix(s, Prefix) {
		return bad("it does not begin with %s", Prefix)
	}
	parts := strings.Split(s[len(Prefix):], ",")
	if strings.HasPrefix(parts[0], "fd=") {
		n, err := strconv.ParseUint(parts[0][3:], 10, 31)
		if err != nil {
			return bad("%q is no number of a descriptor", parts[0][3:])
		}
		spec.FD = int(n)
	} else {
		spec.Path = parts[0]
		if spec.Path == "" || len(spec.Path) > maxPath || strings.IndexByte(spec.Path, 0) >= 0 {
			return bad("the path has %d bytes, 1 to %d are possible", len(spec.Path), maxPath)
		}
	}
	spec.Client = front && spec.FD < 0
	for _, p := range parts[1:] {
		switch {
		case p == "client" && spec.FD < 0 && !front:
			spec.Client = true
		case p == "server" && spec.FD < 0 && front:
			spec.Client = false
		case strings.HasPrefix(p, "mode=") && spec.FD < 0:
			n, err := strconv.ParseUint(p[5:], 8, 32)
			if err != nil || n == 0 || n > 0o777 {
				return bad("mode %q is none: 1 to 777, octal", p[5:])
			}
			spec.Mode = os.FileMode(n)
		case strings.HasPrefix(p, "queues=") && !front:
			n, err := strconv.ParseUint(p[7:], 10, 31)
			if err != nil || n < 1 || n > maxPairs {
				return bad("%q is no number of queue pairs: 1 to %d", p[7:], maxPairs)
			}
			spec.Queues = int(n)
		case (p == "slots=off" || p == "slots=on") && !front:
			spec.NoSlots = p == "slots=off"
		case (p == "status=off" || p == "status=on") && !front:
			spec.NoStatus = p == "status=off"
		default:
			return bad("%q is no option", p)
		}
	}
	if spec.Client && spec.Mode != 0 {
		return bad("mode is for a socket that this program makes, and it connects to that of the other side")
	}
	return spec, nil
}
