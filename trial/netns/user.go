//go:build linux

package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// userMark is set in the environment of the process that EnterUser starts, so that a user
// namespace without rights ends in an error, not in another user namespace.
const userMark = "BOARDLINK_USERNS"

// TunPath is the device through which the kernel hands out tap and tun interfaces
// (Documentation/networking/tuntap.rst).
const TunPath = "/dev/net/tun"

// NeedsUser reports whether this process lacks what New, Do and interfaces need (CAP_SYS_ADMIN,
// CAP_NET_ADMIN) and should call EnterUser.
func NeedsUser() bool {
	return !capable(unix.CAP_SYS_ADMIN) || !capable(unix.CAP_NET_ADMIN)
}

// InUser reports whether this process was started by EnterUser.
func InUser() bool { return os.Getenv(userMark) != "" }

// CheckTun reports in one line why tap and tun interfaces cannot be had, nil if they can.
func CheckTun() error {
	fd, err := unix.Open(TunPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return tunError(err)
	}
	return unix.Close(fd)
}

func tunError(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("open %s: %w: load the kernel module tun, or give the container the device", TunPath, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("open %s: %w: run as root, or let this user read and write it", TunPath, err)
	}
	return fmt.Errorf("open %s: %w", TunPath, err)
}

// EnterUser runs this program again, with the same arguments, environment and standard streams,
// as root of a new user, network and mount namespace, passes signals on to it, waits for it and exits
// with its status (128 + the number where a signal ended it). It returns only if that cannot be:
// an error of one line that says what the system forbids. Call it first thing in main, where
// NeedsUser says so; it ends in an error in the program run again, too, should the namespace
// bring no rights there.
func EnterUser() error {
	if InUser() {
		return fmt.Errorf("the user namespace gives no rights over the network%s: run as root", userHint(readSysctl))
	}
	if err := CheckTun(); err != nil {
		return err
	}
	cmd := userCommand("/proc/self/exe", os.Args)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// Pdeathsig goes by the thread that starts the child: it must outlive the child.
	runtime.LockOSThread()
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return userError(err, readSysctl)
	}
	go func() {
		for s := range signals {
			// A terminal's keys reach the whole foreground group, the child included.
			if (s == unix.SIGINT || s == unix.SIGQUIT) && foreground() {
				continue
			}
			cmd.Process.Signal(s)
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("wait for the program in its user namespace: %w", err)
	}
	st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && st.Signaled() {
		os.Exit(128 + int(st.Signal()))
	}
	os.Exit(cmd.ProcessState.ExitCode())
	return nil
}

// userCommand prepares a program to run as root of a new user, network and mount namespace. The mounts are as they are
// outside; the namespace gives the right to make file systems of its own.
func userCommand(path string, args []string) *exec.Cmd {
	return &exec.Cmd{
		Path: path,
		Args: args,
		Env:  append(os.Environ(), userMark+"=1"),
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags:                 unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
			UidMappings:                []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
			GidMappings:                []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
			GidMappingsEnableSetgroups: false,
			Pdeathsig:                  unix.SIGKILL,
		},
	}
}

// userError says in one line why no user namespace could be had.
func userError(err error, sysctl func(string) string) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		err = errno // without "fork/exec /proc/self/exe", which worked or was not reached
	}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		return fmt.Errorf("make a user namespace: %w: too many, or forbidden%s: run as root", err, userHint(sysctl))
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("make a user namespace: %w: the system forbids it%s: run as root", err, userHint(sysctl))
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("make a user namespace: %w: the kernel has none (CONFIG_USER_NS): run as root", err)
	}
	return fmt.Errorf("make a user namespace: %w", err)
}

// userHint names the settings that are in the way, as " (name=value, ...)", or is empty.
func userHint(sysctl func(string) string) string {
	var found []string
	for _, s := range []struct{ name, bad string }{
		{"user.max_user_namespaces", "0"},
		{"user.max_net_namespaces", "0"},
		{"kernel.unprivileged_userns_clone", "0"},             // Debian's kernels
		{"kernel.apparmor_restrict_unprivileged_userns", "1"}, // AppArmor, on by default in Ubuntu
	} {
		if sysctl(s.name) == s.bad {
			found = append(found, s.name+"="+s.bad)
		}
	}
	if len(found) == 0 {
		return ""
	}
	return " (" + strings.Join(found, ", ") + ")"
}

// readSysctl returns a setting of the kernel, empty if there is none.
func readSysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// capable reports whether the calling thread has a capability in effect.
func capable(c int) bool {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData // version 3 has two words of each set
	if unix.Capget(&h, &d[0]) != nil {
		return false
	}
	return d[c/32].Effective>>(c%32)&1 != 0
}

// foreground reports whether this process is in the foreground group of its terminal.
func foreground() bool {
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	pgrp, err := unix.IoctlGetUint32(fd, unix.TIOCGPGRP)
	return err == nil && int(pgrp) == unix.Getpgrp()
}
