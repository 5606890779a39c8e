package app

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/tunbridge"
)

// MachineIDEnv is the environment variable that states the machine's identity where no flag does.
const MachineIDEnv = "BOARDLINK_MACHINE_ID"

// maxMachineID limits a stated identity, in bytes.
const maxMachineID = 256

// Machine is the identity of this machine, as far as MAC addresses need it: two machines have
// different ones, and one machine has the same one at every start.
type Machine struct {
	digest string // of the identity, which itself is never shown (machine-id(5))
	// From says where the identity comes from: a flag, a file.
	From string
	// Warning is one line where the identity lasts no longer than the program; "" otherwise.
	Warning string
}

// sources are where an identity is looked for.
type sources struct {
	root   string   // in front of /etc, /sys and /proc; "" but for tests
	state  []string // directories that outlive the program, best first
	random func(b []byte) error
}

// Identify returns the identity of this machine: stated, if not empty (the flag --machine-id); else what
// the environment variable BOARDLINK_MACHINE_ID says; else /etc/machine-id; else the firmware's UUID or
// serial number; else a random one, which is kept in the state directory. Where even that cannot
// be kept, it lasts as long as the program, and Warning says so.
func Identify(stated string) (Machine, error) {
	if stated == "" {
		stated = os.Getenv(MachineIDEnv)
	}
	return sources{state: stateDirs(), random: random}.identify(stated)
}

// stateDirs returns where a program of this user may keep something, best first.
func stateDirs() []string {
	var dirs []string
	if d := os.Getenv("STATE_DIRECTORY"); d != "" { // systemd's, a list with colons
		dirs = append(dirs, strings.SplitN(d, ":", 2)[0])
	}
	if os.Geteuid() == 0 {
		return append(dirs, "/var/lib/boardlink")
	}
	if d := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(d) {
		return append(dirs, filepath.Join(d, "boardlink"))
	}
	if d := os.Getenv("HOME"); filepath.IsAbs(d) {
		dirs = append(dirs, filepath.Join(d, ".local", "state", "boardlink"))
	}
	return dirs
}

func random(b []byte) error {
	for n := 0; n < len(b); {
		k, err := unix.Getrandom(b[n:], 0)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("getrandom: %w", err)
		}
		if k > 0 {
			n += k
		}
	}
	return nil
}

func machine(from, id string) Machine {
	sum := sha256.Sum256([]byte("boardlink machine\x00" + id))
	return Machine{digest: hex.EncodeToString(sum[:]), From: from}
}

func (s sources) identify(stated string) (Machine, error) {
	if stated = strings.TrimSpace(stated); stated != "" {
		if len(stated) > maxMachineID {
			return Machine{}, Usagef("--machine-id: %d bytes, %d at most", len(stated), maxMachineID)
		}
		return machine("--machine-id", stated), nil
	}
	for _, f := range []struct {
		path string
		ok   func(string) bool
	}{
		{"/etc/machine-id", isMachineID},
		{"/sys/class/dmi/id/product_uuid", isSerial}, // for root only
		{"/sys/firmware/devicetree/base/serial-number", isSerial},
		{"/proc/device-tree/serial-number", isSerial}, // where sysfs is not mounted
	} {
		if id := readID(s.root + f.path); f.ok(id) {
			return machine(f.path, id), nil
		}
	}
	var errs []string
	for _, dir := range s.state {
		id, err := s.keep(s.root + dir)
		if err == nil {
			return machine(filepath.Join(dir, keptName), id), nil
		}
		errs = append(errs, err.Error())
	}
	id, err := s.fresh()
	if err != nil {
		return Machine{}, err
	}
	m := machine("random", id)
	m.Warning = "this machine has no identity (no /etc/machine-id, no serial number of the firmware"
	if len(errs) > 0 {
		m.Warning += ", " + strings.Join(errs, ", ")
	}
	m.Warning += "): the MAC addresses are random, and others after the next start; give --machine-id or " + MachineIDEnv
	return m, nil
}

// readID returns the file's text without spaces and zero bytes around it; "" where it cannot be read.
func readID(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, maxMachineID)
	n, _ := f.Read(b)
	return strings.ToLower(strings.Trim(string(b[:n]), " \t\r\n\x00"))
}

// isMachineID tells whether the text is a machine-id(5): 32 hexadecimal digits, and not the words or zeros of an image
// that has not been started yet.
func isMachineID(id string) bool {
	if len(id) != 32 || !isSerial(id) {
		return false
	}
	_, err := hex.DecodeString(id)
	return err == nil
}

// fakeSerials are what firmware says that has no serial number of its own.
var fakeSerials = []string{"03000200-0400-0500-0006-000700080009", "not settable", "not specified", "not available", "to be filled by o.e.m.",
	"default string", "system serial number", "0123456789", "1234567890", "123456789", "12345678"}

// isSerial tells whether the text is likely to differ from machine to machine.
func isSerial(id string) bool {
	if len(id) < 4 {
		return false
	}
	for _, fake := range fakeSerials {
		if id == fake {
			return false
		}
	}
	// All characters alike but for hyphens: zeros, ones, "ffffffff-ffff-...".
	digits := strings.Replace(id, "-", "", -1)
	return digits != "" && strings.Trim(digits, digits[:1]) != ""
}

// keptName is the file with the identity of a machine that has none.
const keptName = "machine-id"

func (s sources) fresh() (string, error) {
	b := make([]byte, 16)
	if err := s.random(b); err != nil {
		return "", err
	}
	return hex.EncodeToString(b), nil
}

// keep returns the identity that is kept in dir, and makes one where there is none. Programs that start at the
// same time agree: the file appears whole, and the first one stays.
func (s sources) keep(dir string) (string, error) {
	path := filepath.Join(dir, keptName)
	if id := readID(path); isMachineID(id) {
		return id, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	id, err := s.fresh()
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp(dir, keptName+"-")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(id + "\n")
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", err
	}
	if err = os.Link(f.Name(), path); errors.Is(err, os.ErrExist) {
		if id = readID(path); !isMachineID(id) {
			// What is there is not an identity (an empty file after a power failure): replace it.
			return s.replace(f.Name(), path)
		}
		return id, nil
	}
	return id, err
}

func (s sources) replace(from, path string) (string, error) {
	if err := os.Rename(from, path); err != nil {
		return "", err
	}
	id := readID(path)
	if !isMachineID(id) {
		return "", fmt.Errorf("%s: is not an identity", path)
	}
	return id, nil
}

// MAC returns the address that device number dev of a link has on a side unless the operator chose one: the same at
// every start, and another one on another machine, for another board, link, side or device.
func (m Machine) MAC(link string, side board.Side, spec string, dev int) tunbridge.MAC {
	return tunbridge.StableMAC(fmt.Sprintf("boardlink %s %s %s %d %s", m.digest, link, side, dev, Slot(spec)))
}

// Slot returns what a board's spec says of its place, without how it is opened: the PCI address ("pci 0000:01:00.0"), the
// path of the rendezvous, or else the whole spec.
func Slot(spec string) string {
	i := strings.IndexByte(spec, ':')
	if i < 0 {
		return spec
	}
	kind, what := spec[:i], spec[i+1:]
	if isDoor(spec) {
		what = strings.SplitN(what, ",", 2)[0]
	}
	if kind == "loopback" || isDoor(spec) {
		if strings.HasPrefix(what, "fd=") {
			return kind // the number is that of one start
		}
		if p, err := filepath.Abs(what); err == nil {
			return kind + " " + p
		}
		return spec
	}
	what = strings.SplitN(what, ",", 2)[0]
	what = what[strings.LastIndexByte(what, '@')+1:]
	if a, err := pci.ParseAddress(what); err == nil {
		return "pci " + a.String()
	}
	return spec
}
