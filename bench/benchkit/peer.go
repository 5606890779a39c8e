//go:build linux

package benchkit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// EnvPeer is the environment variable that tells this program to be the other side of a benchmark: the name of a role, a colon, and its
// order in JSON.
const EnvPeer = "BOARDLINK_BENCH_PEER"

// FirstFD is the file descriptor of the first of the files that a peer is given; the others follow.
const FirstFD = 3

var roles = map[string]func(order []byte) (result any, err error){}

// Register adds a role: what a process does for a benchmark as its other side. order is the JSON that Start was given; the
// result goes back as JSON. To be called while packages are initialised.
func Register(name string, role func(order []byte) (result any, err error)) {
	if roles[name] != nil {
		panic("benchkit: two roles " + name)
	}
	roles[name] = role
}

// Peer runs a role and ends the process, where that was ordered; else it does nothing. Every program that starts peers calls it first of
// all (in a test: in TestMain).
func Peer() {
	s, ok := os.LookupEnv(EnvPeer)
	if !ok {
		return
	}
	name, order, _ := strings.Cut(s, ":")
	var a answer
	if role := roles[name]; role == nil {
		a.Err = fmt.Sprintf("this program has no role %q", name)
	} else if r, err := role([]byte(order)); err != nil {
		a.Err = err.Error()
	} else if a.Result, err = json.Marshal(r); err != nil {
		a.Err = err.Error()
	}
	json.NewEncoder(os.Stdout).Encode(&a)
	if a.Err != "" {
		os.Exit(1)
	}
	os.Exit(0)
}

// answer is what a peer prints.
type answer struct {
	Err    string
	Result json.RawMessage `json:",omitempty"`
}

// Process is a peer that runs.
type Process struct {
	cmd    *exec.Cmd
	gone   chan struct{}
	out    bytes.Buffer
	errs   bytes.Buffer
	result error
	cancel context.CancelFunc
}

// Command returns this program's command line, behind the emulator that runs it, where one does.
func Command() ([]string, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return append(strings.Fields(os.Getenv("BOARDLINK_TEST_EXEC")), exe), nil
}

// Start runs a role in a process of its own: this program, unless command is not nil. The files become its descriptors from FirstFD on.
// It is killed when ctx ends, and when this process dies. Stop or Wait are to be called.
func Start(ctx context.Context, role string, order any, files []*os.File, command []string) (*Process, error) {
	return StartOn(ctx, -1, role, order, files, command)
}

// StartOn is Start of a process that may only use one processor, as taskset(1) has it; -1: all that this one may.
func StartOn(ctx context.Context, cpu int, role string, order any, files []*os.File, command []string) (*Process, error) {
	if os.Getenv(EnvPeer) != "" {
		return nil, errors.New("a peer starts no peers: the program does not call benchkit.Peer")
	}
	b, err := json.Marshal(order)
	if err != nil {
		return nil, err
	}
	if len(command) == 0 {
		if command, err = Command(); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &Process{cmd: exec.CommandContext(ctx, command[0], command[1:]...), gone: make(chan struct{}), cancel: cancel}
	p.cmd.Env = append(os.Environ(), EnvPeer+"="+role+":"+string(b))
	p.cmd.ExtraFiles = files
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.errs
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// Pdeathsig comes when the thread ends that has started the peer: it has to live as long.
		unpin, err := Pin(-1)
		if err == nil {
			defer unpin()
			err = p.startOn(cpu)
		}
		started <- err
		if err == nil {
			p.result = p.cmd.Wait()
			close(p.gone)
		}
	}()
	if err := <-started; err != nil {
		cancel()
		return nil, fmt.Errorf("the peer %s: %w", command[0], err)
	}
	return p, nil
}

func (p *Process) startOn(cpu int) error {
	unpin, err := Pin(cpu) // inherited
	if err != nil {
		return err
	}
	defer unpin()
	return p.cmd.Start()
}

// PID is the process'.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Gone is closed when the process has ended.
func (p *Process) Gone() <-chan struct{} { return p.gone }

// Wait waits until the process has ended and decodes its result. The error is what the role returned, or how the process ended.
func (p *Process) Wait(result any) error {
	<-p.gone
	p.cancel()
	var a answer
	err := json.NewDecoder(&p.out).Decode(&a)
	switch {
	case err == nil && a.Err != "":
		return errors.New(a.Err)
	case p.result != nil:
		return fmt.Errorf("the peer: %w: %s", p.result, strings.TrimSpace(p.errs.String()))
	case err == io.EOF:
		return errors.New("the peer said nothing: the program does not call benchkit.Peer")
	case err != nil:
		return fmt.Errorf("the peer: %w", err)
	}
	return json.Unmarshal(a.Result, result)
}

// Stop kills the process, where it still runs, and waits for its end.
func (p *Process) Stop() {
	p.cancel()
	<-p.gone
}
