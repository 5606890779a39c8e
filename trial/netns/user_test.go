//go:build linux

package netns

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The helper "user" takes what it is to do from its arguments: first where a private /dev/net is
// made (as root, in a mount namespace of its own), then what an unprivileged user does there.
//
//	mount <tun mode> <what>   mount a /dev/net with a tun of that mode (0 for none), go on as nobody
//	enter <what>              NeedsUser, EnterUser, then <what>
func helperUser() {
	die := func(err error) {
		fmt.Println("error:", err)
		os.Exit(2)
	}
	switch os.Args[1] {
	case "mount":
		runtime.LockOSThread()
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			die(err)
		}
		if err := unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, ""); err != nil {
			die(err)
		}
		var mode uint32
		fmt.Sscanf(os.Args[2], "%o", &mode)
		if mode != 0 {
			if err := unix.Mknod(TunPath, unix.S_IFCHR|mode, int(unix.Mkdev(10, 200))); err != nil {
				die(err)
			}
			unix.Chmod(TunPath, mode)
		}
		cmd := exec.Command(os.Args[3], "enter", os.Args[4])
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: 65534, Gid: 65534},
			Pdeathsig:  unix.SIGKILL,
		}
		if err := cmd.Start(); err != nil {
			die(err)
		}
		sigs := make(chan os.Signal, 1)
		signal.Notify(sigs, unix.SIGTERM)
		go func() {
			for s := range sigs {
				cmd.Process.Signal(s)
			}
		}()
		cmd.Wait()
		st := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if st.Signaled() {
			os.Exit(99)
		}
		os.Exit(st.ExitStatus())
	case "enter":
		if NeedsUser() {
			die(EnterUser())
		}
	}
	switch os.Args[2] {
	case "work":
		if !InUser() || os.Geteuid() != 0 {
			die(fmt.Errorf("not in a user namespace: uid %d", os.Geteuid()))
		}
		n, err := New()
		if err != nil {
			die(err)
		}
		err = n.Do(func() error {
			fd, err := unix.Open(TunPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			ifr, err := unix.NewIfreq("t0")
			if err != nil {
				return err
			}
			ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
			return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
		})
		if err != nil {
			die(err)
		}
		fmt.Println("a tap in a namespace of a user")
		os.Exit(7) // has to come through
	case "kill":
		unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	case "signal":
		c := make(chan os.Signal, 1)
		signal.Notify(c, unix.SIGTERM)
		fmt.Println("ready")
		fmt.Println(<-c)
		os.Exit(8)
	case "again":
		// As in a namespace in which AppArmor gives no rights.
		die(EnterUser())
	case "limit":
		// The limit is of each user namespace: a real refusal that only we meet.
		if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0); err != nil {
			die(err)
		}
		os.Unsetenv(userMark)
		die(EnterUser())
	}
}

// asNobody runs the helper as an unprivileged user with its own /dev/net/tun.
func asNobody(t *testing.T, tunMode, what string) *exec.Cmd {
	t.Helper()
	needRoot(t)
	if _, err := os.Stat("/dev/net"); err != nil {
		missing(t, "needs /dev/net to mount on")
	}
	if os.Geteuid() != 0 || InUser() {
		missing(t, "needs root, to become another user")
	}
	// The user must be able to read the program.
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "netns")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	exe := filepath.Join(dir, "helper")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(exe, self, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := helper("user", "mount", tunMode, exe, what)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	return cmd
}

func TestEnterUser(t *testing.T) {
	for _, tc := range []struct {
		name, tunMode, what string
		status              int
		out                 string
	}{
		{"works", "666", "work", 7, "a tap in a namespace of a user\n"},
		{"killed", "666", "kill", 128 + 9, ""},
		{"no rights inside", "666", "again", 2, "error: the user namespace gives no rights over the network: run as root\n"},
		{"limit of user namespaces", "666", "limit", 2, "error: make a user namespace: no space left on device: too many, or forbidden (user.max_user_namespaces=0): run as root\n"},
		{"tun forbidden", "600", "work", 2, "error: open /dev/net/tun: permission denied: run as root, or let this user read and write it\n"},
		{"no tun", "0", "work", 2, "error: open /dev/net/tun: no such file or directory: load the kernel module tun, or give the container the device\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := asNobody(t, tc.tunMode, tc.what)
			var out bytes.Buffer
			cmd.Stdout = &out
			cmd.Run()
			if hint := userHint(readSysctl); hint != "" && strings.Contains(out.String(), hint) {
				missing(t, "user namespaces are forbidden:"+hint)
			}
			if got := cmd.ProcessState.ExitCode(); got != tc.status || out.String() != tc.out {
				t.Errorf("status %d, printed %q; want %d, %q", got, out.String(), tc.status, tc.out)
			}
		})
	}
}

func TestEnterUserPassesSignalsOn(t *testing.T) {
	cmd := asNobody(t, "666", "signal")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "ready\n" {
		cmd.Wait()
		t.Fatalf("printed %q, %v", line, err)
	}
	cmd.Process.Signal(unix.SIGTERM)
	rest, err := io.ReadAll(out)
	cmd.Wait()
	if err != nil || string(rest) != "terminated\n" || cmd.ProcessState.ExitCode() != 8 {
		t.Errorf("printed %q, %v, status %d", rest, err, cmd.ProcessState.ExitCode())
	}
}

func TestUserErrorNamesWhatIsInTheWay(t *testing.T) {
	sysctl := func(settings map[string]string) func(string) string {
		return func(name string) string { return settings[name] }
	}
	for _, tc := range []struct {
		err      error
		settings map[string]string
		want     string
	}{
		{unix.EPERM, nil, "make a user namespace: operation not permitted: the system forbids it: run as root"},
		{unix.EPERM, map[string]string{"kernel.unprivileged_userns_clone": "0"},
			"make a user namespace: operation not permitted: the system forbids it (kernel.unprivileged_userns_clone=0): run as root"},
		{unix.ENOSPC, map[string]string{"user.max_user_namespaces": "0", "user.max_net_namespaces": "100"},
			"make a user namespace: no space left on device: too many, or forbidden (user.max_user_namespaces=0): run as root"},
		{unix.EACCES, map[string]string{"kernel.apparmor_restrict_unprivileged_userns": "1"},
			"make a user namespace: permission denied: the system forbids it (kernel.apparmor_restrict_unprivileged_userns=1): run as root"},
		{unix.EINVAL, nil, "make a user namespace: invalid argument: the kernel has none (CONFIG_USER_NS): run as root"},
		{unix.ENOMEM, nil, "make a user namespace: cannot allocate memory"},
	} {
		err := userError(&os.PathError{Op: "fork/exec", Path: "/proc/self/exe", Err: tc.err}, sysctl(tc.settings))
		if err.Error() != tc.want || !errors.Is(err, tc.err) {
			t.Errorf("got  %v\nwant %s", err, tc.want)
		}
	}
}
