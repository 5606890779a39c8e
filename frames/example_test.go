package frames_test

import (
	"fmt"

	"github.com/boardlink/boardlink/frames"
	"github.com/boardlink/boardlink/mmio"
)

// Both ends in one program: a batch of frames goes to the device side, and one comes back.
func ExampleConnect() {
	c, err := frames.Connect(frames.Shared{MaxFrame: 1514, Packed: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()

	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	out, err := c.Driver.Sender.Reserve(2)
	must(err)
	for i := range out {
		out[i].Len = copy(out[i].Room, fmt.Sprintf("frame %d", i))
	}
	must(c.Driver.Sender.Send(len(out)))

	in, err := c.Device.Receiver.Receive(64)
	must(err)
	for _, frame := range in {
		fmt.Printf("%s\n", frame)
	}
	must(c.Device.Receiver.Done())

	out, err = c.Device.Sender.Reserve(1)
	must(err)
	out[0].Len = copy(out[0].Room, "answer")
	must(c.Device.Sender.Send(1))
	in, err = c.Driver.Receiver.Receive(64)
	must(err)
	fmt.Printf("%s\n", in[0])
	// Output:
	// frame 0
	// frame 1
	// answer
}

// Each side makes its own end, over memory that both have mapped, and sleeps until there is something.
func ExampleShared() {
	mem := make([]byte, frames.SharedSize(1514, 16)) // stands for an mmap that both programs share
	bells, err := frames.NewBells()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer bells.Close()
	s := frames.Shared{Mem: mmio.FromBytes(mem), MaxFrame: 1514, Size: 16, Bells: bells}
	driver, err := s.Driver() // first: it writes the queues anew
	if err != nil {
		fmt.Println(err)
		return
	}

	done := make(chan struct{})
	go func() { // the other program
		defer close(done)
		device, err := s.Device()
		for err == nil {
			var in [][]byte
			if in, err = device.Receiver.Receive(16); len(in) > 0 {
				fmt.Printf("%s\n", in[0])
				return
			}
			_, err = device.Receiver.Wait()
		}
		fmt.Println(err)
	}()
	out, err := driver.Sender.Reserve(1)
	if err != nil || len(out) == 0 {
		fmt.Println(err)
		return
	}
	out[0].Len = copy(out[0].Room, "hello")
	err = driver.Sender.Send(1)
	<-done
	fmt.Println(err)
	// Output:
	// hello
	// <nil>
}
