package main

import (
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/boardlink/boardlink/board/generic"
)

// samples are descriptions to start from.
//
//go:embed samples/*.toml
var samples embed.FS

type checkCmd struct {
	File   []string `arg:"" optional:"" help:"Files that describe a board of the kind generic."`
	Sample string   `placeholder:"NAME" help:"Print a description to start from: ${samples}."`
	JSON   bool     `name:"json" help:"Print JSON: an array with one object for each file."`
}

// checked is what was found in one file.
type checked struct {
	File     string            `json:"file"`
	OK       bool              `json:"ok"`
	Name     string            `json:"name,omitempty"`  // of the board
	Sides    []string          `json:"sides,omitempty"` // that it describes
	Problems []generic.Problem `json:"problems"`
}

func sampleNames() string {
	var names []string
	fs.WalkDir(samples, "samples", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			names = append(names, strings.TrimSuffix(d.Name(), ".toml"))
		}
		return nil
	})
	return strings.Join(names, ", ")
}

func (c *checkCmd) Run(s *streams) error {
	if c.Sample != "" {
		if len(c.File) > 0 {
			return usagef("--sample %s: prints a description, and checks no file; leave out %s", c.Sample, c.File[0])
		}
		text, err := samples.ReadFile("samples/" + c.Sample + ".toml")
		if err != nil {
			return usagef("--sample %s: there are %s", c.Sample, sampleNames())
		}
		_, err = s.out.Write(text)
		return err
	}
	if len(c.File) == 0 {
		return usagef("a file is missing: boardlink check FILE, or --sample NAME for one to start from (%s)", sampleNames())
	}
	bad := false
	all := []checked{}
	for _, file := range c.File {
		r := checked{File: file, Problems: []generic.Problem{}}
		cfg, err := generic.Load(file)
		var fe *generic.FileError
		switch {
		case errors.As(err, &fe):
			r.Problems = fe.Problems
		case err != nil:
			var pe *os.PathError
			if errors.As(err, &pe) {
				err = pe.Err // the file is named already
			}
			r.Problems = []generic.Problem{{Reason: "cannot be read: " + err.Error()}}
		default:
			r.OK, r.Name = true, cfg.Name
			if cfg.Host != nil {
				r.Sides = append(r.Sides, "host")
			}
			if cfg.Agent != nil {
				r.Sides = append(r.Sides, "agent")
			}
		}
		bad = bad || !r.OK
		all = append(all, r)
	}
	if c.JSON {
		e := json.NewEncoder(s.out)
		e.SetIndent("", "  ")
		if err := e.Encode(all); err != nil {
			return err
		}
	} else {
		for _, r := range all {
			for _, p := range r.Problems {
				where := r.File
				if p.Line != 0 {
					where = fmt.Sprintf("%s:%d", r.File, p.Line)
				}
				p.Line = 0
				fmt.Fprintf(s.out, "%s: %s\n", where, p)
			}
			if r.OK {
				fmt.Fprintf(s.out, "%s: ok: %s\n", r.File, describes(r.Sides))
			}
		}
	}
	if bad {
		return statusError(exitUsage)
	}
	return nil
}

func describes(sides []string) string {
	if len(sides) == 2 {
		return "describes both ends, and they agree"
	}
	other := map[string]string{"host": "agent", "agent": "host"}[sides[0]]
	return fmt.Sprintf("describes the %s's end; there is no [%s]", sides[0], other)
}
