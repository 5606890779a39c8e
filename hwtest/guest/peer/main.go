//go:build linux

// Command peer is the end of a trial inside of a virtual machine: it echoes, or checks another's echo and prints the
// result as JSON.
//
//	peer echo
//	peer check ADDRESS [PINGS [BYTES]]
//	peer memory FUNCTION on|off
//	peer master FUNCTION on|off
//	peer wipe FUNCTION
//
// memory sets or clears the memory-enable bit of a PCI function, master its bus-master bit, wipe clears its BARs and command register as a reset of the
// board does, both behind the back of whoever uses it.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/boardlink/boardlink/hwtest/remote"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	switch {
	case len(args) == 1 && args[0] == "echo":
		return remote.Echo(ctx)
	case len(args) >= 2 && args[0] == "check":
		addr, err := netip.ParseAddr(args[1])
		if err != nil {
			return err
		}
		var c remote.Config
		if len(args) > 2 {
			if c.Pings, err = strconv.Atoi(args[2]); err != nil {
				return err
			}
		}
		if len(args) > 3 {
			if c.Bytes, err = strconv.ParseInt(args[3], 10, 64); err != nil {
				return err
			}
		}
		r, err := remote.Check(ctx, nil, addr, c)
		if jerr := json.NewEncoder(os.Stdout).Encode(r); jerr != nil {
			return jerr
		}
		return err
	}
	if len(args) == 3 && args[0] == "memory" {
		return command(args[1], 1<<1, args[2] == "on")
	}
	if len(args) == 3 && args[0] == "master" {
		return command(args[1], 1<<2, args[2] == "on")
	}
	if len(args) == 2 && args[0] == "wipe" {
		return wipe(args[1])
	}
	return fmt.Errorf("usage: peer echo | peer check ADDRESS [PINGS [BYTES]] | peer memory FUNCTION on|off | peer master FUNCTION on|off | peer wipe FUNCTION")
}

// command sets or clears a bit of the command register in configuration space (PCI 3.0, 6.2.2).
func command(fn string, bit byte, on bool) error {
	const register = 4
	f, err := os.OpenFile("/sys/bus/pci/devices/"+fn+"/config", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var b [2]byte
	if _, err := f.ReadAt(b[:], register); err != nil {
		return err
	}
	b[0] &^= bit
	if on {
		b[0] |= bit
	}
	_, err = f.WriteAt(b[:], register)
	return err
}

// wipe clears what a reset of the board clears: command register and BARs.
func wipe(fn string) error {
	f, err := os.OpenFile("/sys/bus/pci/devices/"+fn+"/config", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 2), 4); err != nil {
		return err
	}
	for off := int64(0x10); off < 0x28; off += 4 {
		if _, err := f.WriteAt(make([]byte, 4), off); err != nil {
			return err
		}
	}
	return nil
}
