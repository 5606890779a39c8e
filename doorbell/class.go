package doorbell

import "fmt"

// Class is how urgent a user of a doorbell is. Where several share one, the more urgent are rung first.
type Class uint8

// The classes. The zero value is Interactive.
const (
	Interactive Class = iota // a person or a program waits for each answer: networks
	Control                  // what an operator needs when all else is busy: consoles
	Bulk                     // throughput counts, not each answer: disks, entropy
)

var classNames = [...]string{Interactive: "interactive", Control: "control", Bulk: "bulk"}

// String returns the name that ParseClass takes.
func (c Class) String() string {
	if int(c) < len(classNames) {
		return classNames[c]
	}
	return fmt.Sprintf("class(%d)", uint8(c))
}

// ParseClass reads "control", "interactive" or "bulk".
func ParseClass(s string) (Class, error) {
	for c, name := range classNames {
		if s == name {
			return Class(c), nil
		}
	}
	return 0, fmt.Errorf("%q: control, interactive or bulk is wanted", s)
}

// before tells whether a user of class c is rung before one of class d.
func (c Class) before(d Class) bool {
	rank := [...]uint8{Control: 0, Interactive: 1, Bulk: 2}
	return rank[c] < rank[d]
}

// User is one of those that doorbells are assigned to.
type User struct {
	Bell  int // index of its doorbell
	Class Class
}
