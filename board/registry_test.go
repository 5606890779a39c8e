package board_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board"
)

func TestRegistry(t *testing.T) {
	var got string
	var opts board.Options
	board.Register(board.Kind{Name: "zz-test", Help: "ANY", Open: func(arg string, o board.Options) (board.Board, error) {
		got, opts = arg, o
		return nil, errors.New("opened")
	}})
	board.Register(board.Kind{Name: "aa-test", Help: "NONE", Open: func(string, board.Options) (board.Board, error) { return nil, nil }})
	for spec, want := range map[string]string{"zz-test:a:b": "a:b", "zz-test:": "", "zz-test": ""} {
		got = "?"
		if _, err := board.Open(spec, board.Options{Side: board.Agent}); err == nil || err.Error() != "opened" || got != want || opts.Side != board.Agent {
			t.Errorf("Open(%q): %q, %v, %v", spec, got, opts, err)
		}
	}
	for _, spec := range []string{"", ":", "nope:x", "zz:x", "ZZ-test:x"} {
		_, err := board.Open(spec, board.Options{})
		if !errors.Is(err, board.ErrInput) || !strings.Contains(err.Error(), "aa-test, zz-test") {
			t.Errorf("Open(%q): %v", spec, err)
		}
	}
	if _, err := board.Open("zz-test:x", board.Options{Side: 2}); !errors.Is(err, board.ErrInput) {
		t.Errorf("side 2: %v", err)
	}
	var names []string
	for _, k := range board.Kinds() {
		names = append(names, k.Name)
	}
	if strings.Join(names, " ") != "aa-test zz-test" {
		t.Errorf("Kinds: %v", names)
	}
	for _, k := range []board.Kind{
		{Name: "zz-test", Open: func(string, board.Options) (board.Board, error) { return nil, nil }},
		{Name: "a:b", Open: func(string, board.Options) (board.Board, error) { return nil, nil }},
		{Name: "", Open: func(string, board.Options) (board.Board, error) { return nil, nil }},
		{Name: "no-open"},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Register(%q) did not panic", k.Name)
				}
			}()
			board.Register(k)
		}()
	}
}

func TestError(t *testing.T) {
	below := errors.New("below")
	err := error(&board.Error{Spec: "k:a", Reason: "why", Class: board.ErrAbsent, Err: below})
	if err.Error() != "board k:a: why: below" || !errors.Is(err, board.ErrAbsent) || !errors.Is(err, below) || errors.Is(err, board.ErrInput) {
		t.Error(err)
	}
	if errors.Is(&board.Error{Spec: "k:a", Reason: "why"}, board.ErrInput) {
		t.Error("an error of no class matches one")
	}
}

func TestSide(t *testing.T) {
	if board.Host.Other() != board.Agent || board.Agent.Other() != board.Host || board.Host.String() != "host" || board.Agent.String() != "agent" {
		t.Error("sides are mixed up")
	}
}
