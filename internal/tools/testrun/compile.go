package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// pkg is a package with tests.
type pkg struct {
	path string // what it is imported by
	dir  string
	base string // the last part of path, by which go names what it compiles
	size int64  // of its tests' sources
	lab  bool   // it has tests of real Linux guests
	// plain says that tests of it start themselves without the race detector.
	plain bool
}

// kind is a way to compile tests.
type kind string

const (
	race  kind = "race"
	plain kind = "plain" // without the race detector: for the emulated host, and for children of tests that are many
)

// list returns the packages that patterns name, all if there is none, in the order in which to run
// them: those with most tests first.
func (r *runner) list(ctx context.Context, patterns []string) ([]*pkg, error) {
	if len(patterns) == 0 {
		patterns = []string{"./..."}
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "go",
		append([]string{"list", "-json=ImportPath,Dir,TestGoFiles,XTestGoFiles"}, patterns...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("list packages: %w\n%s", err, &stderr)
	}
	var all []*pkg
	for d := json.NewDecoder(&stdout); ; {
		var l struct {
			ImportPath, Dir           string
			TestGoFiles, XTestGoFiles []string
		}
		if err := d.Decode(&l); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("list packages: %w", err)
		}
		p := &pkg{path: l.ImportPath, dir: l.Dir, base: path.Base(l.ImportPath)}
		for _, name := range append(l.TestGoFiles, l.XTestGoFiles...) {
			text, err := os.ReadFile(filepath.Join(l.Dir, name))
			if err != nil {
				return nil, err
			}
			p.size += int64(len(text))
			p.lab = p.lab || bytes.Contains(text, []byte("\nfunc TestLinux"))
			p.plain = p.plain || bytes.Contains(text, []byte("testenv.PlainBinary("))
		}
		if p.size > 0 {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b *pkg) int {
		// The lab's own tests watch the machine while hosts boot and stall, for which others would wait.
		if last := strings.Compare(strconv.FormatBool(a.isLab()), strconv.FormatBool(b.isLab())); last != 0 {
			return last
		}
		return int(b.size - a.size)
	})
	return all, nil
}

func (p *pkg) isLab() bool { return strings.HasSuffix(p.path, "/internal/lab") }

// name is the package's among files.
func (p *pkg) name() string { return strings.ReplaceAll(p.path, "/", "-") }

// binary is where a package's tests are compiled to.
func (r *runner) binary(k kind, p *pkg) string { return filepath.Join(r.dir, string(k), p.name()) }

// compile compiles the tests of packages: by go's leave all at once, but for those of equal names.
func (r *runner) compile(ctx context.Context, all []*pkg, k kind) error {
	begun := time.Now()
	defer func() { r.times.add("compile, "+string(k), time.Since(begun)) }()
	dir := filepath.Join(r.dir, string(k))
	for len(all) > 0 {
		names := map[string]*pkg{}
		var now, later []*pkg
		for _, p := range all {
			if k == plain && !p.lab && !p.plain {
				continue
			}
			if names[p.base] != nil {
				later = append(later, p)
				continue
			}
			names[p.base] = p
			now = append(now, p)
		}
		if len(now) == 0 {
			return nil
		}
		args := []string{"test", "-c", "-trimpath", "-ldflags=-w", "-o", dir + "/"} // nobody debugs these
		cgo := "CGO_ENABLED=0"
		if k == race {
			args, cgo = append(args, "-race"), "CGO_ENABLED=1"
		}
		for _, p := range now {
			args = append(args, p.path)
		}
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = append(os.Environ(), cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("compile tests (%s): %w\n%s", k, err, out)
		}
		for _, p := range now {
			if err := os.Rename(filepath.Join(dir, p.base+".test"), r.binary(k, p)); err != nil {
				return err
			}
		}
		all = later
	}
	return nil
}
