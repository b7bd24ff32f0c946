package smartvm_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"push.rocks/smartvm"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
)

// The house rules of docs/architecture.md, as tests.

const module = "push.rocks/smartvm"

// Limits in lines. Of a package, lines of code count: no blank ones, no comments, no tests.
const (
	maxPackage  = 1500
	maxFile     = 500
	maxFunction = 80
	maxParams   = 4
)

// roomier packages and why.
var roomier = map[string]int{
	".":            2400, // what an embedder uses is one package, so that its types are methods' receivers and results
	"internal/cli": 1600, // one file a command
}

type house struct {
	fset     *token.FileSet
	packages map[string][]*source // by folder, "." for the root
}

type source struct {
	path string
	text []byte
	ast  *ast.File
	test bool
}

func readHouse(t *testing.T) *house {
	t.Helper()
	h := &house{fset: token.NewFileSet(), packages: map[string][]*source{}}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || path == "bench") {
			return fs.SkipDir // bench is a module of its own
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(h.fset, path, text, parser.ParseComments)
		if err != nil {
			return err
		}
		dir := filepath.Dir(path)
		h.packages[dir] = append(h.packages[dir], &source{path, text, f, strings.HasSuffix(path, "_test.go")})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(h.packages["."]) == 0 {
		t.Fatal("the root package was not found")
	}
	return h
}

// each calls f for every file that is not a test.
func (h *house) each(f func(dir string, s *source)) {
	for _, dir := range slices.Sorted(maps.Keys(h.packages)) {
		for _, s := range h.packages[dir] {
			if !s.test {
				f(dir, s)
			}
		}
	}
}

// ring of a folder: 0 mechanisms, 1 the domain, 2 programs.
func ring(dir string) int {
	switch {
	case dir == ".":
		return 1
	case dir == "internal/cli", strings.HasPrefix(dir, "internal/cli/"), dir == "internal/supervise",
		dir == "internal/warm", strings.HasPrefix(dir, "cmd/"), strings.HasPrefix(dir, "internal/tools/"):
		return 2
	}
	return 0
}

func TestHouse_Imports(t *testing.T) {
	readHouse(t).each(func(dir string, s *source) {
		for _, spec := range s.ast.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			own, isOwn := strings.CutPrefix(path, module)
			to := strings.TrimPrefix(own, "/")
			if to == "" {
				to = "."
			}
			std := !strings.Contains(strings.SplitN(path, "/", 2)[0], ".")
			switch {
			case dir == "firecracker" && !std:
				t.Errorf("%s imports %s: the API client stands on the standard library alone", s.path, path)
			case !isOwn:
			case ring(dir) < ring(to):
				t.Errorf("%s (ring %d) imports %s (ring %d)", s.path, ring(dir), path, ring(to))
			case to == "internal/cli" && !strings.HasPrefix(dir, "cmd/"):
				t.Errorf("%s imports the CLI: nothing but its main may", s.path)
			}
		}
	})
}

func TestHouse_Sizes(t *testing.T) {
	h := readHouse(t)
	lines := map[string]int{}
	h.each(func(dir string, s *source) {
		lines[dir] += codeLines(s.text)
		if n := bytes.Count(s.text, []byte("\n")); n > maxFile {
			t.Errorf("%s has %d lines, over %d", s.path, n, maxFile)
		}
		for _, decl := range s.ast.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if n := h.fset.Position(f.End()).Line - h.fset.Position(f.Pos()).Line + 1; n > maxFunction && !isTable(f) {
				t.Errorf("%s: %s has %d lines, over %d", s.path, f.Name.Name, n, maxFunction)
			}
			if n := params(f); n > maxParams {
				t.Errorf("%s: %s has %d parameters, over %d", s.path, f.Name.Name, n, maxParams)
			}
		}
	})
	for dir, n := range lines {
		limit := max(maxPackage, roomier[dir])
		if n > limit {
			t.Errorf("package %s has %d lines of code, over %d", dir, n, limit)
		}
	}
}

// params counts a function's parameters but for its context.
func params(f *ast.FuncDecl) int {
	n := f.Type.Params.NumFields()
	if n > 0 {
		if t, ok := f.Type.Params.List[0].Type.(*ast.SelectorExpr); ok && t.Sel.Name == "Context" {
			n--
		}
	}
	return n
}

func codeLines(text []byte) (n int) {
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) > 0 && !bytes.HasPrefix(line, []byte("//")) {
			n++
		}
	}
	return n
}

// isTable says whether a function is one switch or one return: a flat table may be long.
func isTable(f *ast.FuncDecl) bool {
	if f.Body == nil || len(f.Body.List) > 2 {
		return false
	}
	switch f.Body.List[0].(type) {
	case *ast.ReturnStmt, *ast.SwitchStmt, *ast.TypeSwitchStmt:
		return true
	}
	return false
}

// Libraries own nothing of the process they live in.
func TestHouse_Manners(t *testing.T) {
	forbidden := map[string]string{
		"os.Getenv":     "read the environment",
		"os.LookupEnv":  "read the environment",
		"os.Exit":       "end the process",
		"signal.Notify": "install signal handlers",
		"log.Fatal":     "end the process",
	}
	mayReadEnv := map[string]bool{
		"internal/cli": true, "internal/testenv": true, "internal/testenv/nettest": true,
		"internal/fakefc": true,
	}
	readHouse(t).each(func(dir string, s *source) {
		program := strings.HasPrefix(dir, "cmd/") || strings.HasPrefix(dir, "internal/tools/") || mayReadEnv[dir]
		ast.Inspect(s.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Name.Name == "init" && n.Recv == nil {
					t.Errorf("%s has an init function", s.path)
				}
			case *ast.SelectorExpr:
				x, ok := n.X.(*ast.Ident)
				if what := forbidden[fmt.Sprint(x)+"."+n.Sel.Name]; ok && what != "" && !program {
					t.Errorf("%s: a library must not %s (%s.%s)", s.path, what, x, n.Sel)
				}
			}
			return true
		})
	})
}

func TestHouse_PackageDocs(t *testing.T) {
	for dir, sources := range readHouse(t).packages {
		documented := slices.ContainsFunc(sources, func(s *source) bool { return !s.test && s.ast.Doc != nil })
		code := slices.ContainsFunc(sources, func(s *source) bool { return !s.test })
		if code && !documented {
			t.Errorf("package %s has no documentation", dir)
		}
	}
}

// docs/architecture.md names every package and its ring, docs/layout.md every file name,
// docs/effects.md every effect.

var tableRow = regexp.MustCompile("(?m)^\\| `([^`]+)` \\| ([^|]+) \\|")

func rows(t *testing.T, doc string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, m := range tableRow.FindAllStringSubmatch(string(text), -1) {
		found[m[1]] = strings.TrimSpace(m[2])
	}
	return found
}

func compare(t *testing.T, doc string, documented, real map[string]string) {
	t.Helper()
	for name, value := range real {
		if got, ok := documented[name]; !ok {
			t.Errorf("%s does not mention %s", doc, name)
		} else if value != "" && got != value {
			t.Errorf("%s says %q of %s, want %q", doc, got, name, value)
		}
	}
	for name := range documented {
		if _, ok := real[name]; !ok {
			t.Errorf("%s mentions %s, which there is not", doc, name)
		}
	}
}

func TestDocs_Architecture(t *testing.T) {
	packages := map[string]string{}
	readHouse(t).each(func(dir string, s *source) { packages[dir] = fmt.Sprint(ring(dir)) })
	compare(t, "docs/architecture.md", rows(t, "docs/architecture.md"), packages)
}

func TestDocs_Layout(t *testing.T) {
	names := map[string]string{}
	for _, s := range readHouse(t).packages["internal/store"] {
		if filepath.Base(s.path) != "names.go" {
			continue
		}
		ast.Inspect(s.ast, func(n ast.Node) bool {
			if spec, ok := n.(*ast.ValueSpec); ok {
				value, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				names[value] = ""
			}
			return true
		})
	}
	compare(t, "docs/layout.md", rows(t, "docs/layout.md"), names)
}

func TestDocs_Effects(t *testing.T) {
	kinds := map[string]string{}
	for _, all := range []journal.Kinds{smartvm.EffectKinds(), network.Kinds()} {
		for kind := range all {
			kinds[kind] = ""
		}
	}
	compare(t, "docs/effects.md", rows(t, "docs/effects.md"), kinds)
}
