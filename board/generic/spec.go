package generic

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/internal/fn"
	"github.com/boardlink/boardlink/pci"
)

// FileError is a file that is not a valid description.
type FileError struct {
	Path     string
	Problems []Problem // at least one
}

// Error gives the first problem, and how to see the others.
func (e *FileError) Error() string {
	s := e.Path + ": " + e.Problems[0].String()
	if n := len(e.Problems) - 1; n > 0 {
		s += fmt.Sprintf(" (and %d more: boardlink check %s)", n, e.Path)
	}
	return s
}

// Load reads and checks a description. What is wrong with it is a *FileError.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data := make([]byte, maxFile+1)
	n, err := io.ReadFull(f, data)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, err
	}
	if n > maxFile {
		return nil, &FileError{path, []Problem{{Reason: fmt.Sprintf("has more than %d bytes: it is not a description of a board", maxFile)}}}
	}
	c, problems := Check(data[:n])
	if len(problems) > 0 {
		return nil, &FileError{path, problems}
	}
	return c, nil
}

// CheckSpec reads the description that the argument of a spec, FILE or FILE@ADDRESS, names, without the hardware: nil, or
// the error that Open returns for it.
func CheckSpec(arg string) error {
	_, _, _, err := parseSpec(arg)
	return err
}

// parseSpec takes the argument of a spec apart, and reads the file.
func parseSpec(arg string) (a fn.Arg, addr string, c *Config, err error) {
	if a, err = fn.ParseArg(Name, arg, "mode", "interrupts"); err != nil {
		return a, "", nil, err
	}
	file := a.What
	if i := strings.LastIndexByte(file, '@'); i >= 0 {
		file, addr = file[:i], file[i+1:]
	}
	if file == "" {
		return a, addr, nil, a.Bad("the file that describes the board is missing (generic:FILE@ADDRESS)")
	}
	if c, err = Load(file); err != nil {
		var p *os.PathError
		if errors.As(err, &p) {
			return a, addr, nil, &board.Error{Spec: a.Spec, Reason: "the description cannot be read", Class: board.ErrInput, Err: err}
		}
		return a, addr, nil, a.Bad("%v", err)
	}
	a.What = file
	return a, addr, c, nil
}

// Open opens the end o.Side.
func Open(arg string, o board.Options) (*Board, error) {
	if o.Side == board.Agent {
		a, c, addr, irq, err := parse(arg)
		if err != nil {
			return nil, err
		}
		if addr != "" {
			return nil, a.Bad("the agent opens the file alone (generic:%s): it has no PCI function", a.What)
		}
		if c.Agent == nil {
			return nil, a.Bad("%s: there is no [agent]", a.What)
		}
		return openAgent(a.Spec, c, o, !irq)
	}
	a, c, irq, err := parseHost(arg)
	if err != nil {
		return nil, err
	}
	f, err := a.Open(o)
	if err != nil {
		return nil, err
	}
	return New(a.Spec, f, c, o, !irq)
}

// parseHost reads the host's argument; the result's What is the PCI address.
func parseHost(arg string) (a fn.Arg, c *Config, irq bool, err error) {
	a, c, addr, irq, err := parse(arg)
	if err != nil {
		return a, c, irq, err
	}
	if addr == "" {
		return a, c, irq, a.Bad("the PCI address is missing (generic:%s@0000:01:00.0)", a.What)
	}
	if c.Host == nil {
		return a, c, irq, a.Bad("%s: there is no [host]", a.What)
	}
	a.What = addr
	a.DMAMask = c.Host.dmaMask()
	if i := c.Host.Interrupt; i != nil {
		a.Interrupts = interruptKinds[i.Kind]
	}
	a.Match = func(i *pci.Info) error { return c.identify(a.Spec, i) }
	a.Fits = func(i *pci.Info) []error { return c.Host.fits(a.Spec, i) }
	return a, c, irq, nil
}

// interruptKinds are the values of the key interrupt.kind; any other is none in particular.
var interruptKinds = map[string]pci.InterruptKind{"intx": pci.INTx, "msi": pci.MSI, "msix": pci.MSIX}

// identify returns nil for a function that the description may be for.
func (c *Config) identify(spec string, i *pci.Info) error {
	if (c.Vendor != 0 && i.Vendor != c.Vendor) || (c.Device != 0 && i.Device != c.Device) {
		return fn.NoSuchBoard(spec, i, fmt.Sprintf("the description is for %04x:%04x", c.Vendor, c.Device))
	}
	return nil
}

// fits looks at the BARs that the description names.
func (h *Host) fits(spec string, i *pci.Info) []error {
	bars := []int{h.Window.BAR}
	add := func(n int) {
		for _, b := range bars {
			if b == n {
				return
			}
		}
		bars = append(bars, n)
	}
	if h.Ring != nil {
		add(h.Ring.BAR)
	}
	if h.Interrupt != nil && h.Interrupt.Cause != nil {
		add(h.Interrupt.Cause.BAR)
	}
	if h.Engine != nil {
		add(h.Engine.BAR)
	}
	return fn.Bars(spec, i, func(b pci.BAR) error {
		if b.Index == h.Window.BAR && h.Window.Offset < b.Size {
			n := b.Size - h.Window.Offset
			if h.Window.Size != 0 && h.Window.Size < n {
				n = h.Window.Size
			}
			return h.checkWindow(spec, n)
		}
		return nil
	}, bars...)
}

// checkWindow returns nil for a size that the window may have.
func (h *Host) checkWindow(spec string, size uint64) error {
	if size < MinWindow || h.Window.BusAddress+size-1 < h.Window.BusAddress {
		return &board.Error{Spec: spec, Class: board.ErrInput,
			Reason: fmt.Sprintf("host.window: %#x bytes; %#x at least are wanted, that do not pass 2^64", size, MinWindow)}
	}
	return nil
}

// parse reads the argument and the description. The result's What is the file; irq is false where this side
// is to poll.
func parse(arg string) (a fn.Arg, c *Config, addr string, irq bool, err error) {
	if a, addr, c, err = parseSpec(arg); err != nil {
		return a, nil, addr, false, err
	}
	on, err := a.OneOf("interrupts", "on", "on", "off")
	return a, c, addr, on == "on", err
}
