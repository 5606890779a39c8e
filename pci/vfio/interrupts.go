package vfio

import (
	"fmt"
	"unsafe"

	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/pci/internal/evfd"
)

// Interrupts implements pci.Function.
func (f *function) Interrupts() pci.Interrupts {
	for _, k := range []struct {
		index int
		kind  pci.InterruptKind
	}{{irqMSIX, pci.MSIX}, {irqMSI, pci.MSI}, {irqINTx, pci.INTx}} {
		if f.opt.Interrupts != pci.NoInterrupts && f.opt.Interrupts != k.kind {
			continue
		}
		if ii := f.irqs[k.index]; ii.count > 0 && ii.flags&irqEventfd != 0 {
			return pci.Interrupts{Kind: k.kind, Count: int(ii.count)}
		}
	}
	return pci.Interrupts{}
}

func irqIndex(k pci.InterruptKind) uint32 {
	switch k {
	case pci.MSIX:
		return irqMSIX
	case pci.MSI:
		return irqMSI
	}
	return irqINTx
}

// waiter is one vector.
type waiter struct {
	f *function
	e evfd.FD
	// unmask is what Ack tells the kernel for INTx; nil for messages. It is made once: an Ack
	// allocates nothing.
	unmask *irqSetHead
}

// FD implements pci.Waiter.
func (w *waiter) FD() int { return int(w.e) }

// Ack implements pci.Waiter.
func (w *waiter) Ack() (uint64, error) {
	n, err := w.e.Ack()
	if err != nil || n == 0 || w.unmask == nil {
		return n, err
	}
	if _, err := ioctlPtr(w.f.fd, reqDeviceSetIRQs, unsafe.Pointer(w.unmask)); err != nil {
		return n, fmt.Errorf("pci function %s: unmasking its interrupt: %w", w.f.info.Address, err)
	}
	return n, nil
}

// setEventfds wires an interrupt index to eventfds; none takes the index down.
func (f *function) setEventfds(index uint32, fds []evfd.FD) error {
	const head = unsafe.Sizeof(irqSetHead{})
	b := infoBuffer(int(head) + 4*len(fds))
	h := (*irqSetHead)(unsafe.Pointer(&b[0]))
	*h = irqSetHead{argsz: uint32(int(head) + 4*len(fds)), index: index, count: uint32(len(fds))}
	h.flags = irqSetActionTrigger | irqSetDataNone
	if len(fds) > 0 {
		h.flags = irqSetActionTrigger | irqSetDataEventfd
	}
	for i, e := range fds {
		native.PutUint32(b[int(head)+4*i:], uint32(int32(e)))
	}
	_, err := ioctlPtr(f.fd, reqDeviceSetIRQs, unsafe.Pointer(h))
	return err
}

// EnableInterrupts implements pci.Function.
func (f *function) EnableInterrupts(n int) ([]pci.Waiter, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, pci.ErrClosed
	}
	if err := f.disableInterrupts(); err != nil {
		return nil, err
	}
	have := f.Interrupts()
	if n < 1 || n > have.Count {
		return nil, f.fail(pci.NoInterrupt, nil, "has no %d interrupts but %d (%s)", n, have.Count, have.Kind)
	}
	if have.Kind != pci.INTx {
		// The interrupt is a write by the function.
		if err := f.master.Set(true); err != nil {
			return nil, err
		}
	} else if err := f.config.SetCommand(0, pci.CommandINTxDisable); err != nil {
		return nil, err
	}
	var fds []evfd.FD
	drop := func() {
		for _, e := range fds {
			e.Close()
		}
	}
	ws := make([]pci.Waiter, n)
	for i := range ws {
		e, err := evfd.New()
		if err != nil {
			drop()
			return nil, err
		}
		fds = append(fds, e)
		w := &waiter{f: f, e: e}
		if have.Kind == pci.INTx {
			w.unmask = &irqSetHead{argsz: uint32(unsafe.Sizeof(irqSetHead{})), flags: irqSetDataNone | irqSetActionUnmask, index: irqINTx, count: 1}
		}
		ws[i] = w
	}
	if err := f.setEventfds(irqIndex(have.Kind), fds); err != nil {
		drop()
		return nil, f.fail(pci.Other, err, "its %d %s interrupts cannot be wired", n, have.Kind)
	}
	f.kind, f.waiters = have.Kind, fds
	return ws, nil
}

// DisableInterrupts implements pci.Function.
func (f *function) DisableInterrupts() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return pci.ErrClosed
	}
	return f.disableInterrupts()
}

func (f *function) disableInterrupts() error {
	if f.kind == pci.NoInterrupts {
		return nil
	}
	err := f.setEventfds(irqIndex(f.kind), nil)
	for _, e := range f.waiters {
		e.Close()
	}
	f.kind, f.waiters = pci.NoInterrupts, nil
	if err != nil {
		return f.fail(pci.Other, err, "its interrupts cannot be taken down")
	}
	return nil
}
