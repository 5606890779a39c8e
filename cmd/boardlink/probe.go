package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/ivshmem"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/pci/scan"
)

type probeCmd struct {
	All  bool `short:"a" help:"Show every PCI function, also those that cannot be boards."`
	JSON bool `name:"json" help:"Print JSON."`
}

// candidate is a PCI function as probe shows it.
type candidate struct {
	Address    string   `json:"address"`
	ID         string   `json:"id"` // vendor:device
	Name       string   `json:"name"`
	Class      string   `json:"class"`
	Kind       string   `json:"kind,omitempty"` // of board, where it is recognised
	Driver     string   `json:"driver,omitempty"`
	IOMMUGroup string   `json:"iommu_group,omitempty"`
	NoIOMMU    bool     `json:"no_iommu,omitempty"` // the group is VFIO's substitute for one
	Shared     []string `json:"shared,omitempty"`   // others in the IOMMU group
	Interrupts string   `json:"interrupts"`
	Link       string   `json:"link,omitempty"` // PCI Express
	BARs       []bar    `json:"bars"`
	Missing    string   `json:"missing,omitempty"` // what stands between it and its use, and the command that mends it
	Use        string   `json:"use,omitempty"`     // how to use it; empty where the kernel uses it

	problems []string // Missing, one each
}

type bar struct {
	Index    int    `json:"index"`
	Size     uint64 `json:"size"`
	Prefetch bool   `json:"prefetchable"`
	Bits64   bool   `json:"bits64"`
	IO       bool   `json:"io"`
	Assigned bool   `json:"assigned"`
}

// kinds are the boards that are recognised by their ids. MPC83xx: Freescale's vendor id and the family's
// device ids, 0x0080 to 0x0087 (not verified on silicon, see docs/boards.md).
func kindOf(i *pci.Info) string {
	switch {
	case i.Vendor == ivshmem.Vendor && i.Device == ivshmem.Device:
		return "ivshmem"
	case i.Vendor == 0x1957 && i.Device >= 0x0080 && i.Device <= 0x0087:
		return "mpc83xx"
	}
	return ""
}

// possible tells whether a function could be a board at all: an endpoint with memory of its own that no class of device
// of this machine claims.
func possible(i *pci.Info) bool {
	if i.BARs == nil {
		return false
	}
	switch i.Class >> 16 {
	case 0x01, 0x02, 0x03, 0x06, 0x0c: // storage, network, display, bridge, serial bus
		return kindOf(i) != "" || i.Driver == "vfio-pci" || i.Driver == "uio_pci_generic"
	}
	return true
}

func describe(f scan.Function) candidate {
	i := f.Info
	c := candidate{Address: i.Address.String(), ID: fmt.Sprintf("%04x:%04x", i.Vendor, i.Device), Name: f.VendorName + " " + f.DeviceName,
		Class: f.ClassName, Kind: kindOf(i), Driver: i.Driver, IOMMUGroup: i.IOMMUGroup, NoIOMMU: i.NoIOMMUGroup, BARs: []bar{}}
	for _, a := range i.GroupMembers {
		c.Shared = append(c.Shared, a.String())
	}
	var irq []string
	if i.MSIX != nil {
		irq = append(irq, fmt.Sprintf("MSI-X (%d)", i.MSIX.Vectors))
	}
	if i.MSI != nil {
		irq = append(irq, fmt.Sprintf("MSI (%d)", i.MSI.Vectors))
	}
	if len(i.Config) > 0x3d && i.Config[0x3d] != 0 {
		irq = append(irq, "INTx")
	}
	c.Interrupts = strings.Join(irq, ", ")
	if !i.CapsKnown() {
		c.Interrupts = "unknown (only root may read all of the configuration space)"
	} else if c.Interrupts == "" {
		c.Interrupts = "none"
	}
	if p := i.PCIe; p != nil && p.Width != 0 {
		c.Link = fmt.Sprintf("%.1f GT/s x%d, payload %d bytes", float64(p.Speed)/10, p.Width, p.MaxPayload)
		if p.Width < p.MaxWidth || p.Speed < p.MaxSpeed {
			c.Link += fmt.Sprintf(" (could be %.1f GT/s x%d)", float64(p.MaxSpeed)/10, p.MaxWidth)
		}
	}
	for _, b := range i.BARs {
		c.BARs = append(c.BARs, bar{Index: b.Index, Size: b.Size, Prefetch: b.Prefetch, Bits64: b.Bits64, IO: b.IO, Assigned: !b.Unassigned})
	}
	kind := c.Kind
	if kind == "" {
		kind = "generic:FILE@"
	} else {
		kind += ":"
	}
	c.Use = "boardlink host --board " + kind + c.Address
	for _, err := range diagnose(c.Kind, i) {
		c.problems = append(c.problems, problem(err))
		if isInUse(err) {
			c.Use = ""
		}
	}
	c.Missing = strings.Join(c.problems, "; ")
	return c
}

// diagnose tells what host would refuse the function for. Of a board that is not recognised nothing is known
// but what every function needs.
func diagnose(kind string, i *pci.Info) (found []error) {
	if kind != "" {
		return board.Examine(kind+":"+i.Address.String(), board.Options{})
	}
	s := pci.Sysfs{}
	for _, e := range s.Diagnose(i, pci.Options{}) {
		found = append(found, e)
		if e.Problem == pci.InUse {
			return found
		}
	}
	for _, b := range i.BARs {
		if _, err := i.Usable(b.Index); err != nil && !b.IO {
			found = append(found, err)
		}
	}
	for _, e := range s.Suspect(i, pci.Options{}) {
		found = append(found, e)
	}
	return found
}

func isInUse(err error) bool {
	var e *pci.Error
	return errors.As(err, &e) && e.Problem == pci.InUse
}

// problem says what is missing, without the address that stands beside it.
func problem(err error) string {
	var e *pci.Error
	var b *board.Error
	switch {
	case errors.As(err, &e):
		s := e.Reason
		if e.Err != nil {
			s += ": " + e.Err.Error()
		}
		if e.Mend != "" {
			s += ": " + e.Mend
		}
		return s
	case errors.As(err, &b):
		return b.Reason
	}
	return err.Error()
}

func (c *probeCmd) Run(s *streams) error {
	fs, err := scan.All(pci.Sysfs{})
	found := []candidate{}
	for _, f := range fs {
		if c.All || possible(f.Info) {
			found = append(found, describe(f))
		}
	}
	if c.JSON {
		e := json.NewEncoder(s.out)
		e.SetIndent("", "  ")
		if jerr := e.Encode(found); jerr != nil {
			return jerr
		}
		return err
	}
	if len(found) == 0 && err == nil {
		fmt.Fprintln(s.err, "boardlink probe: no PCI function that could be a board; --all shows the others")
	}
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	for n, f := range found {
		if n > 0 {
			fmt.Fprintln(w)
		}
		kind := f.Kind
		if kind == "" {
			kind = "not recognised"
		}
		fmt.Fprintf(w, "%s\t%s, %s [%s]\n", f.Address, f.Class, f.Name, f.ID)
		fmt.Fprintf(w, "  kind\t%s\n", kind)
		for _, b := range f.BARs {
			what := sizeString(b.Size)
			for _, x := range []struct {
				on   bool
				text string
			}{{b.IO, "I/O ports"}, {b.Bits64, "64 bit"}, {b.Prefetch, "prefetchable"}, {!b.Assigned, "no address assigned"}} {
				if x.on {
					what += ", " + x.text
				}
			}
			fmt.Fprintf(w, "  BAR %d\t%s\n", b.Index, what)
		}
		fmt.Fprintf(w, "  interrupts\t%s\n", f.Interrupts)
		if f.Link != "" {
			fmt.Fprintf(w, "  link\t%s\n", f.Link)
		}
		group := "none"
		if f.IOMMUGroup != "" {
			group = "group " + f.IOMMUGroup
			if f.NoIOMMU {
				group += " (no IOMMU behind it)"
			}
			if len(f.Shared) > 0 {
				group += ", shared with " + strings.Join(f.Shared, " ")
			}
		}
		fmt.Fprintf(w, "  IOMMU\t%s\n", group)
		driver := f.Driver
		if driver == "" {
			driver = "none"
		}
		fmt.Fprintf(w, "  driver\t%s\n", driver)
		for _, p := range f.problems {
			fmt.Fprintf(w, "  missing\t%s\n", p)
		}
		if f.Use != "" {
			fmt.Fprintf(w, "  use\t%s\n", f.Use)
		}
	}
	w.Flush()
	return err
}
