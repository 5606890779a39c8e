package virtio

// ConsoleNames returns the names of the bits of a console device (virtio 1.2, 5.3.3), in the order of their numbers.
func ConsoleNames(s Features) []string {
	size := s.Has(ConsoleSize)
	s.Clear(ConsoleSize)
	if size {
		return append([]string{"size"}, s.Names()...)
	}
	return s.Names()
}
