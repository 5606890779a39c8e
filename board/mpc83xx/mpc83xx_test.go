package mpc83xx_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/mpc83xx"
	"github.com/boardlink/boardlink/pci"
)

// TestArguments: what the operator wrote wrongly, by side.
func TestArguments(t *testing.T) {
	for _, tc := range []struct {
		arg  string
		side board.Side
		want string
	}{
		{"", board.Host, "PCI address"},
		{"0000:00:04.0,target=x", board.Host, "target"},
		{"0000:00:04.0,target=0x123", board.Host, "target"},
		{"0000:00:04.0,interrupts=maybe", board.Host, "interrupts"},
		{"", board.Agent, "board mpc83xx:: on the board, immr=ADDRESS"},
		{"0000:00:04.0", board.Agent, "key=value"},
		{"immr=0xe0000000", board.Agent, "window"},
		{"immr=0xe0000000+0x1000,window=0+0x10000", board.Agent, "messaging unit"},
		{"immr=0xe0000000,window=0x1000000", board.Agent, "size"},
		{"immr=0xe0000000,window=0+0x18000", board.Agent, "power of two"},
		{"immr=0xe0000000,window=0+0x10000,bus=7", board.Agent, "bus"},
		{"immr=0xe0000000,window=0+0x10000,memory=warm", board.Agent, "memory"},
		{"immr=0xe0000000,window=0+0x10000,colour=1", board.Agent, "colour"},
	} {
		_, err := board.Open("mpc83xx:"+tc.arg, board.Options{Side: tc.side})
		if !errors.Is(err, board.ErrInput) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s %q: %v", tc.side, tc.arg, err)
		}
	}
}

// TestPinsINTx: the messaging unit raises no messages, so the function is opened for its line, whatever else it has, unless
// the operator says otherwise.
func TestPinsINTx(t *testing.T) {
	for arg, want := range map[string]pci.InterruptKind{
		"": pci.INTx, ",interrupts=on": pci.INTx, ",interrupts=intx": pci.INTx, ",interrupts=msi": pci.MSI, ",interrupts=msix": pci.MSIX,
		",interrupts=off": pci.NoInterrupts,
	} {
		if got, err := mpc83xx.InterruptsOf("0000:01:00.0" + arg); err != nil || got != want {
			t.Errorf("%q: opened for %s, want %s; %v", arg, got, want, err)
		}
	}
}

// TestAgentFile: the board's end by its argument, over a file that stands for memory and registers. (A file
// is no register: what was written stays.)
func TestAgentFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mem")
	if err := os.WriteFile(path, make([]byte, 0x200000), 0o600); err != nil {
		t.Fatal(err)
	}
	arg := fmt.Sprintf("mpc83xx:immr=%s@0,window=%s@0x100000+0x100000,bus=0x1f000000,memory=cached", path, path)
	b, err := board.Open(arg, board.Options{Side: board.Agent})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if w := b.Window(); w.Addr != 0x1f000000 || w.Mem.Size() != 0x100000 {
		t.Errorf("%+v", w)
	}
	if i := b.Self(); i.Method != board.RingNone {
		t.Errorf("without an interrupt: %+v", i)
	}
	if _, err := b.Ringer(board.RingInfo{Method: board.RingBoard, Vectors: mpc83xx.OutboundBits + 1}, 0); err == nil {
		t.Error("more vectors than the host's doorbell has")
	}
	r, err := b.Ringer(board.RingInfo{Method: board.RingBoard, Vectors: mpc83xx.OutboundBits}, 28)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Ring(); err != nil {
		t.Fatal(err)
	}
	m, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	reg := func(off int) string { return fmt.Sprintf("%x", m[mpc83xx.MU+off:mpc83xx.MU+off+4]) }
	// Little-endian: ODR bit 28, all of IDR cleared by ones, IDI masked.
	if reg(mpc83xx.ODR) != "00000010" || reg(mpc83xx.IDR) != "ffffff7f" || reg(mpc83xx.IMIMR) != "08000000" {
		t.Errorf("ODR %s IDR %s IMIMR %s", reg(mpc83xx.ODR), reg(mpc83xx.IDR), reg(mpc83xx.IMIMR))
	}
	if _, err := board.Open(arg, board.Options{Side: board.Agent}); !errors.Is(err, board.ErrSideTaken) {
		t.Errorf("a second agent: %v", err)
	}
}
