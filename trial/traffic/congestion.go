//go:build linux

package traffic

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// allowedCongestion is the setting of the network namespace with the congestion controls that anybody may choose (ip-sysctl).
const allowedCongestion = "net.ipv4.tcp_allowed_congestion_control"

// CongestionError says that the kernel refused a congestion control of TCP to a socket.
type CongestionError struct {
	Name string
	Err  error
}

// Error names the setting that the kernel obeys.
func (e *CongestionError) Error() string {
	s := fmt.Sprintf("TCP with congestion control %s: %v", e.Name, e.Err)
	if e.Err == unix.EPERM {
		allowed := "unknown"
		if b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(allowedCongestion, ".", "/")); err == nil {
			allowed = strings.TrimSpace(string(b))
		}
		s += fmt.Sprintf(": %s has %q, another one takes CAP_NET_ADMIN; as root: sysctl -w %s=%q", allowedCongestion, allowed, allowedCongestion, allowed+" "+e.Name)
	}
	return s
}

// Unwrap returns the kernel's answer.
func (e *CongestionError) Unwrap() error { return e.Err }

// SetCongestion sets the congestion control of a TCP socket, and so of the connections that it accepts. Unlike the setting of a
// namespace, a socket takes any that the kernel has, with CAP_NET_ADMIN in its namespace's user namespace, and
// without it those that are allowed to anybody. A refusal is a *CongestionError.
func SetCongestion(fd int, name string) error {
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name); err != nil {
		return &CongestionError{name, err}
	}
	return nil
}

// congestionOf is for net.Dialer and net.ListenConfig.
func congestionOf(name string) func(network, address string, c syscall.RawConn) error {
	if name == "" {
		return nil
	}
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = SetCongestion(int(fd), name) }); e != nil {
			return e
		}
		return err
	}
}
