package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/boardlink/boardlink/hwtest/guest"
)

// moduleIndex knows where a kernel's modules are.
type moduleIndex struct {
	k       *Kernel
	files   map[string]string // by name, with '-' as '_'
	builtin map[string]bool
}

// moduleName is a module's name as the kernel has it: a file's name without endings, with '-' as '_'.
func moduleName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func (k *Kernel) modules() (*moduleIndex, error) {
	x := &moduleIndex{k: k, files: map[string]string{}, builtin: map[string]bool{}}
	dir := filepath.Join(k.Dir, "lib/modules", k.Release)
	b, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("kernel %s: %w", k.Spec.Name, err)
	}
	for _, f := range strings.Fields(string(b)) {
		x.builtin[moduleName(f)] = true
	}
	// The package has no modules.dep: that is made when it is installed.
	err = filepath.WalkDir(filepath.Join(dir, "kernel"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && strings.Contains(filepath.Base(p), ".ko") {
			x.files[moduleName(p)] = p
		}
		return err
	})
	for n, p := range k.extra {
		x.files[n] = p
	}
	return x, err
}

// unpacked returns a module's file, without compression.
func (x *moduleIndex) unpacked(ctx context.Context, name string) (string, error) {
	p := x.files[name]
	if strings.HasSuffix(p, ".ko") {
		return p, nil
	}
	out := filepath.Join(x.k.Dir, "unpacked", name+".ko")
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	if !strings.HasSuffix(p, ".ko.xz") {
		return "", fmt.Errorf("module %s: unknown compression", p)
	}
	if err := needTools("xz"); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "xz", "-dc", p)
	cmd.SysProcAttr = deathsig()
	var b, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("xz -dc %s: %w: %s", p, err, bytes.TrimSpace(errs.Bytes()))
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.CreateTemp(filepath.Dir(out), ".new-")
	if err != nil {
		return "", err
	}
	_, err = tmp.Write(b.Bytes())
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), out)
	}
	if err != nil {
		os.Remove(tmp.Name())
		return "", err
	}
	return out, nil
}

// depends returns what the module's .modinfo names after "depends=".
func depends(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", file, err)
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("module %s has no .modinfo", file)
	}
	b, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", file, err)
	}
	var deps []string
	for _, field := range strings.Split(string(b), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			for _, d := range strings.Split(list, ",") {
				deps = append(deps, strings.ReplaceAll(d, "-", "_"))
			}
		}
	}
	return deps, nil
}

// resolve returns the modules, each as "name param=value ...", and what they need, in the order of
// loading, and the files. Built-in ones drop out.
func (x *moduleIndex) resolve(ctx context.Context, wanted []string) ([]guest.Module, map[string]string, error) {
	var order []guest.Module
	files := map[string]string{}
	at := map[string]int{}
	var visit func(name, params, by string) error
	visit = func(name, params, by string) error {
		if i, ok := at[name]; ok {
			if i < 0 {
				return fmt.Errorf("kernel %s: module %s depends on itself", x.k.Spec.Name, name)
			}
			if params != "" {
				order[i].Params = params
			}
			return nil
		}
		if x.files[name] == "" {
			if x.builtin[name] {
				return nil
			}
			return fmt.Errorf("kernel %s (%s) has no module %s%s", x.k.Spec.Name, x.k.Release, name, by)
		}
		at[name] = -1
		from, err := x.unpacked(ctx, name)
		if err != nil {
			return err
		}
		deps, err := depends(from)
		if err != nil {
			return err
		}
		for _, d := range deps {
			if err := visit(d, "", ", which "+name+" depends on"); err != nil {
				return err
			}
		}
		to := "/lib/modules/" + name + ".ko"
		at[name] = len(order)
		order = append(order, guest.Module{Name: name, Path: to, Params: params})
		files[to] = from
		return nil
	}
	for _, w := range wanted {
		name, params, _ := strings.Cut(w, " ")
		if err := visit(strings.ReplaceAll(name, "-", "_"), params, ""); err != nil {
			return nil, nil, err
		}
	}
	return order, files, nil
}
