package doorbell_test

import (
	"fmt"

	"github.com/boardlink/boardlink/doorbell"
)

// Two rings before an Ack are one wake-up that counts two.
func ExampleEventfd() {
	e, err := doorbell.NewEventfd()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer e.Close()
	e.Ring()
	e.Ring()
	n, err := e.Ack()
	fmt.Println(n, err)
	// Output: 2 <nil>
}
