package vring

// Settle implements Device.
func (q *SplitDevice) Settle(used []Used, rest int) (call bool, err error) {
	defer func(e error) { q.err = e }(q.err)
	q.err = nil
	if err = q.Complete(used); err == nil {
		q.Unpop(rest)
	}
	return q.NeedCall(), err
}

// Settle implements Device.
func (q *PackedDevice) Settle(used []Used, rest int) (call bool, err error) {
	defer func(e error) { q.err = e }(q.err)
	q.err = nil
	if err = q.Complete(used); err == nil {
		q.Unpop(rest)
	}
	return q.NeedCall(), err
}
