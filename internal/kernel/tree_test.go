package kernel_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/testenv"
)

// packed returns the files that WriteModules takes of a tree.
func packed(t testing.TB, tree fs.FS) map[string]string {
	t.Helper()
	var b bytes.Buffer
	if err := kernel.WriteModules(&b, tree); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(&b); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			files[h.Name] = string(data)
		}
	}
}

// Where depmod has been run its lists are taken; else they are made.
func TestWriteModules(t *testing.T) {
	tree := modules()
	tree["kernel/alone.ko"] = &fstest.MapFile{
		Data: ko("name=alone", "alias=char-major-10-200", "alias=pci:v0000[0-9]d*", "softdep=pre: core"),
	}
	tree["updates/core.ko"] = &fstest.MapFile{Data: ko("name=core")}
	tree["kernel/bad.ko"] = &fstest.MapFile{Data: []byte("no module")}
	got := packed(t, tree)
	wantDep := "kernel/alone.ko:\nkernel/base-x.ko: updates/core.ko\nupdates/core.ko:\nkernel/not-listed.ko:\nkernel/top.ko: kernel/base-x.ko updates/core.ko\n"
	wantAlias := "alias char-major-10-200 alone\nalias pci:v0000[0-9]d* alone\n"
	if got["modules.dep"] != wantDep || got["modules.alias"] != wantAlias ||
		got["modules.softdep"] != "softdep alone pre: core\n" {
		t.Errorf("got modules.dep\n%s, modules.alias\n%s, modules.softdep\n%s", got["modules.dep"], got["modules.alias"],
			got["modules.softdep"])
	}
	for _, name := range []string{"modules.dep.bin", "modules.alias.bin", "modules.builtin.bin"} {
		if !strings.HasPrefix(got[name], "\xb0\x07\xf4\x57") {
			t.Errorf("%s begins with %.4q", name, got[name])
		}
	}
	if _, ok := got["kernel/loose/readme.text"]; ok || got["kernel/bad.ko"] != "no module" ||
		got["modules.builtin"] == "" {
		t.Errorf("files: %v", slices.Sorted(maps.Keys(got)))
	}
	tree["modules.dep"] = &fstest.MapFile{Data: []byte("mine")}
	tree["modules.dep.bin"] = &fstest.MapFile{Data: []byte("mine too")}
	if got := packed(t, tree); got["modules.dep"] != "mine" || got["modules.dep.bin"] != "mine too" ||
		got["modules.alias"] != "" {
		t.Errorf("with depmod's own lists: %q, %q, %q", got["modules.dep"], got["modules.dep.bin"], got["modules.alias"])
	}
}

// A tree is not followed without end.
func TestWriteModules_TooLarge(t *testing.T) {
	tree := fstest.MapFS{}
	var names []string
	for i := range 3000 { // each of which needs those before: 3000² / 2 file names
		name := "module" + strings.Repeat("x", 20) + string(rune('a'+i/676)) + string(rune('a'+i/26%26)) +
			string(rune('a'+i%26))
		fields := []string{"name=" + name}
		if len(names) > 0 {
			fields = append(fields, "depends="+names[len(names)-1])
		}
		names = append(names, name)
		tree["kernel/"+name+".ko"] = &fstest.MapFile{Data: ko(fields...)}
	}
	if err := kernel.WriteModules(io.Discard, tree); !errors.Is(err, kernel.ErrTooLarge) {
		t.Errorf("got error %v", err)
	}
}

func TestModulesRelease(t *testing.T) {
	magic := func(release string) *fstest.MapFile {
		return &fstest.MapFile{Data: ko("vermagic=" + release + " SMP preempt mod_unload modversions ")}
	}
	for name, c := range map[string]struct {
		tree fstest.MapFS
		want string
	}{
		"Usual":     {fstest.MapFS{"kernel/a/x.ko": magic("6.1.0-57-amd64")}, "6.1.0-57-amd64"},
		"OwnFirst":  {fstest.MapFS{"extra/x.ko": magic("5.14.0"), "kernel/a/x.ko": magic("5.14.1")}, "5.14.1"},
		"Elsewhere": {fstest.MapFS{"extra/x.ko": magic("5.14.0")}, "5.14.0"},
		"SomeSilent": {fstest.MapFS{
			"kernel/a.ko": {Data: ko()}, "kernel/b.ko": {Data: []byte("rubbish")},
			"kernel/c.ko": magic("6.1"),
		}, "6.1"},
		"Silent":    {fstest.MapFS{"kernel/a.ko": {Data: ko()}}, ""},
		"NoModules": {fstest.MapFS{"modules.order": {}}, ""},
		"NoRelease": {fstest.MapFS{"kernel/a.ko": magic("../6.1")}, ""},
	} {
		if got, err := kernel.ModulesRelease(c.tree); got != c.want || err != nil {
			t.Errorf("%s: got %q, %v; want %q", name, got, err, c.want)
		}
	}
}

// modprobe finds in the lists of a distribution's kernel what it finds in those of depmod itself.
func TestWriteModules_Depmod(t *testing.T) {
	dir := testenv.Fixture(t, fixtures.GuestModules)
	release := filepath.Base(dir)
	tools := filepath.Dir(testenv.Fixture(t, fixtures.Depmod))
	tool := func(name string, args ...string) []byte {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), filepath.Join(tools, name), args...).Output()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return out
	}
	roots := map[string]string{"ours": t.TempDir(), "depmod": t.TempDir()}
	tree, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	files := packed(t, tree.FS())
	for _, root := range roots {
		to := filepath.Join(root, "lib/modules", release)
		if err := errors.Join(os.MkdirAll(to, 0o755), os.CopyFS(to, tree.FS())); err != nil {
			t.Fatal(err)
		}
	}
	var all []string
	for name, data := range files {
		if strings.HasPrefix(name, "modules.") {
			if err := os.WriteFile(filepath.Join(roots["ours"], "lib/modules", release, name), []byte(data), 0o644); err != nil {
				t.Fatal(err)
			}
		} else {
			all = append(all, strings.TrimSuffix(filepath.Base(name), ".ko"))
		}
	}
	slices.Sort(all)
	tool("depmod", "-b", roots["depmod"], release)
	ask := func(root string, args ...string) string {
		lines := strings.Split(string(tool("modprobe", append([]string{"-d", root, "-S", release}, args...)...)), "\n")
		slices.Sort(lines)
		return strings.ReplaceAll(strings.Join(lines, "\n"), root, "")
	}
	for name, args := range map[string][]string{
		"Dependencies": append([]string{"-a", "--show-depends"}, all...),
		"Aliases": {
			"-R", "pci:v00001AF4d00001000sv00001AF4sd00000001bc02sc00i00", "nft-chain-2-nat",
			"char-major-10-200", "net-pf-16-proto-12",
		},
	} {
		if name == "Aliases" {
			for _, alias := range args[1:] {
				if got, want := ask(roots["ours"], "-R", alias), ask(roots["depmod"], "-R", alias); got != want || got == "" {
					t.Errorf("%s: got %q, want %q", alias, got, want)
				}
			}
			continue
		}
		if diff := cmp.Diff(ask(roots["depmod"], args...), ask(roots["ours"], args...)); diff != "" {
			t.Errorf("%s (-depmod +ours):\n%.4000s", name, diff)
		}
	}
	aliases := func(root string) string {
		var lines []string
		for line := range strings.Lines(ask(root, "-c")) {
			if strings.HasPrefix(line, "alias ") && !strings.HasPrefix(line, "alias symbol:") {
				lines = append(lines, line)
			}
		}
		return strings.Join(lines, "")
	}
	if diff := cmp.Diff(aliases(roots["depmod"]), aliases(roots["ours"])); diff != "" {
		t.Errorf("all aliases (-depmod +ours):\n%.4000s", diff)
	}
}
