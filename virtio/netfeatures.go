package virtio

import "fmt"

// netNeeds says which feature bits of a network device need another one (virtio 1.2, 5.1.3.1), of those that have a name here.
var netNeeds = [...]struct{ bit, needs Feature }{
	{NetGuestTSO4, NetGuestCSUM}, {NetGuestTSO6, NetGuestCSUM}, {NetGuestUSO4, NetGuestCSUM}, {NetGuestUSO6, NetGuestCSUM},
	{NetHostTSO4, NetCSUM}, {NetHostTSO6, NetCSUM}, {NetHostUSO, NetCSUM},
	{NetMQ, NetCtrlVQ},
}

// CheckNet refuses features of a network device that lack a bit which another one of them needs. The error names both.
func CheckNet(f Features) error {
	for _, n := range netNeeds {
		if f.Has(n.bit) && !f.Has(n.needs) {
			return fmt.Errorf("%s without %s (virtio 1.2, 5.1.3.1)", n.bit, n.needs)
		}
	}
	return nil
}

// WithoutOrphans returns the features of a network device less those that lack a bit which they need: CheckNet accepts what is
// left.
func WithoutOrphans(f Features) Features {
	for _, n := range netNeeds { // no bit that is needed needs another one: once is enough
		if !f.Has(n.needs) {
			f.Clear(n.bit)
		}
	}
	return f
}
