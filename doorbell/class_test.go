package doorbell

import (
	"fmt"
	"testing"
)

// A shared doorbell rings its users in the order of their classes, whenever they came; among equals, who came first.
func TestClassOrder(t *testing.T) {
	bell, err := NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	defer bell.Close()
	a, err := Assign([]Waiter{bell}, []User{{Class: Bulk}, {Class: Interactive}, {Class: Interactive}})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	ids := map[*outlet]int{}
	order := func() string {
		for i, e := range a.users {
			if e != nil {
				ids[e.own] = i
			}
		}
		s := ""
		for _, o := range a.bells[0].fan.outs.Load().([]*outlet) {
			s += fmt.Sprintf("%d %s, ", ids[o], o.class)
		}
		return s
	}
	if got, want := order(), "1 interactive, 2 interactive, 0 bulk, "; got != want {
		t.Errorf("rings %q, want %q", got, want)
	}
	for _, c := range []Class{Bulk, Control, Interactive} {
		if _, err := a.Add(User{Class: c}); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := order(), "4 control, 1 interactive, 2 interactive, 5 interactive, 0 bulk, 3 bulk, "; got != want {
		t.Errorf("rings %q, want %q", got, want)
	}
	a.Remove(1)
	a.Remove(3)
	if got, want := order(), "4 control, 2 interactive, 5 interactive, 0 bulk, "; got != want {
		t.Errorf("rings %q, want %q", got, want)
	}
}

func TestClassNames(t *testing.T) {
	for _, c := range []Class{Control, Interactive, Bulk} {
		if got, err := ParseClass(c.String()); err != nil || got != c {
			t.Errorf("%s is read as %s, %v", c, got, err)
		}
	}
	if _, err := ParseClass("urgent"); err == nil || err.Error() != `"urgent": control, interactive or bulk is wanted` {
		t.Errorf("error %v", err)
	}
}
