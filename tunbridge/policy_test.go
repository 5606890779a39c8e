package tunbridge

import "testing"

// Empty speculative reads are earned back by moved frames, and few may be owed.
func TestSpeculativeRation(t *testing.T) {
	var s speculative
	if !s.allowed() {
		t.Error("the first speculative read is not allowed")
	}
	s.missed()
	if s.allowed() {
		t.Error("allowed although an empty read is owed")
	}
	s.earned(missFrames - 1)
	if s.allowed() {
		t.Errorf("allowed although only %d of %d frames were earned back", missFrames-1, missFrames)
	}
	s.earned(1)
	if !s.allowed() {
		t.Error("not allowed although the empty read was earned back")
	}
	s.earned(1 << 20)
	n := 0
	for ; s.allowed(); n++ {
		s.missed()
	}
	if n != maxMisses {
		t.Errorf("%d empty reads in a row after much traffic, want %d", n, maxMisses)
	}
	if s.off = true; s.allowed() {
		t.Error("allowed although switched off")
	}
}

// A batch ends where the last drained one ended; every so often, and soon after frames were left, it is read on.
func TestBatchEndPredicts(t *testing.T) {
	var e batchEnd
	in, want := result{frames: 3}, 0
	if n := e.next(); n != 0 {
		t.Fatalf("a first batch of at most %d frames, want no limit", n)
	}
	in.dry = true
	if e.read(want, in) {
		t.Error("a drained batch counts as ended by prediction")
	}
	in.dry = false
	for i := 0; i < maxPredicted; i++ {
		if want = e.next(); want != 3 {
			t.Fatalf("batch %d of at most %d frames, want 3", i, want)
		}
		if !e.read(want, in) {
			t.Fatalf("batch %d did not end as predicted", i)
		}
		e.polled(false)
	}
	if n := e.next(); n != 0 {
		t.Errorf("a limit of %d frames after %d predicted ends, want none", n, maxPredicted)
	}
	// Frames that are left count for several predicted ends.
	want, in.dry = 0, true
	e.read(want, in)
	in.dry = false
	for i := 0; i < maxPredicted/(leftPredicted+1)+1; i++ {
		want = 3
		e.read(want, in)
		e.polled(true)
	}
	if n := e.next(); n != 0 {
		t.Errorf("a limit of %d frames although each prediction left some, want none", n)
	}
	e = batchEnd{size: 2, off: true}
	if n := e.next(); n != 0 {
		t.Errorf("a limit of %d frames although switched off", n)
	}
}

// Each policy of a loop has its switch.
func TestLoopPoliciesOff(t *testing.T) {
	stop, err := NewStop()
	if err != nil {
		t.Fatal(err)
	}
	defer stop.Close()
	ifc := &Iface{fd: -1}
	ifc.first = ifc
	for _, off := range []Policy{0, SpeculativeReads, BatchEnds, Dozing, SpeculativeReads | BatchEnds | Dozing} {
		p, err := NewLoop(LoopConfig{Off: off}, &fakeHalf{common: common{name: "rx0", ifc: ifc, stop: stop, reads: true}})
		if err != nil {
			t.Fatal(err)
		}
		l := p.(*Loop)
		if l.spec.off != (off&SpeculativeReads != 0) || l.end.off != (off&BatchEnds != 0) {
			t.Errorf("Off %b: speculative reads off %v, batch ends off %v", off, l.spec.off, l.end.off)
		}
		if got := l.sleeper.Dozes(); got != (off&Dozing == 0) {
			t.Errorf("Off %b: dozes %v", off, got)
		}
	}
}
