package modprobe_test

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/guestagent/modprobe"
	"push.rocks/smartvm/internal/testenv"
)

func TestFind(t *testing.T) {
	tree := fstest.MapFS{
		"modules.dep": {Data: []byte(
			"kernel/a.ko:\nkernel/b-c.ko.xz: kernel/d.ko kernel/a.ko\nkernel/d.ko: kernel/a.ko\nkernel/e.ko: kernel/a.ko\nkernel/f.ko:\n")},
		"modules.alias": {Data: []byte(
			"# Aliases\nalias fs-b b_c\nalias pci:v00001AF4d*[0-2]* e\nalias pci:v00001AF4d* f\nalias [ a\nalias gone nonesuch\n")},
		"modules.softdep": {Data: []byte("softdep e pre: f nonesuch post: fs-b\nsoftdep f pre: e\n")},
	}
	for name, want := range map[string]string{
		"a":                   "kernel/a.ko",
		"b-c":                 "kernel/a.ko kernel/d.ko kernel/b-c.ko.xz",
		"b_c":                 "kernel/a.ko kernel/d.ko kernel/b-c.ko.xz",
		"fs-b":                "kernel/a.ko kernel/d.ko kernel/b-c.ko.xz",
		"e":                   "kernel/f.ko kernel/a.ko kernel/e.ko kernel/d.ko kernel/b-c.ko.xz",
		"pci:v00001AF4d00003": "kernel/f.ko kernel/a.ko kernel/e.ko kernel/d.ko kernel/b-c.ko.xz",
		"pci:v00001AF4d3":     "kernel/a.ko kernel/e.ko kernel/d.ko kernel/b-c.ko.xz kernel/f.ko",
		"gone":                "", "nonesuch": "", "": "", "*": "",
	} {
		got, err := modprobe.Find(tree, name)
		if strings.Join(got, " ") != want || errors.Is(err, fs.ErrNotExist) != (want == "") {
			t.Errorf("%q: got %q, %v, want %q", name, got, err, want)
		}
	}
	if got, err := modprobe.Find(fstest.MapFS{}, "a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without lists: %q, %v", got, err)
	}
}

func TestAsked(t *testing.T) {
	for args, want := range map[string]string{"-q -- fs-b": "fs-b", "serve": "", "": "", "-q fs-b": "", "-q -- a b": ""} {
		if got, ok := modprobe.Asked(strings.Fields(args)); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v", args, got, ok)
		}
	}
}

// For a distribution's kernel the modules are those that kmod's modprobe would insert.
func TestFind_Kmod(t *testing.T) {
	modules := testenv.Fixture(t, fixtures.GuestModules)
	release, tools, base := filepath.Base(modules), filepath.Dir(testenv.Fixture(t, fixtures.Depmod)), t.TempDir()
	dir := filepath.Join(base, "lib/modules", release)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(modules)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.Symlink(filepath.Join(modules, e.Name()), filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.CommandContext(t.Context(), filepath.Join(tools, "depmod"), "-b", base,
		release).CombinedOutput(); err != nil {
		t.Fatalf("depmod: %v\n%s", err, out)
	}
	list, err := os.ReadFile(filepath.Join(dir, "modules.alias"))
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"tun", "fs-btrfs", "fs-overlay", "nft-chain-2-nat", "rtnl-link-bridge", "nonesuch"}
	for line := range strings.Lines(string(list)) {
		if f := strings.Fields(line); len(f) == 3 && !strings.ContainsAny(f[1], "*?[") && rand.IntN(20) == 0 {
			names = append(names, f[1])
		}
	}
	unconfigured := t.TempDir() // else this machine's options would be shown too
	for _, name := range names {
		out, _ := exec.CommandContext(t.Context(), filepath.Join(tools, "modprobe"), "-C", unconfigured, "-d", base, "-S",
			release, "--show-depends", "--", name).Output()
		var want []string
		for line := range strings.Lines(string(out)) {
			if path, ok := strings.CutPrefix(strings.TrimSpace(line), "insmod "); ok {
				file, err := filepath.Rel(dir, path)
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, file)
			}
		}
		got, err := modprobe.Find(os.DirFS(dir), name)
		slices.Sort(want) // the order of what does not need each other is free
		if slices.Sort(got); !slices.Equal(got, slices.Compact(want)) || (err == nil) != (len(want) > 0) {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
	t.Logf("%d names", len(names))
}

// Whatever the lists say, what is found is in them.
func FuzzFind(f *testing.F) {
	f.Add("a.ko: b.ko\nb.ko: a.ko\n", "alias fs-* a\n", "softdep a pre: b post: fs-x\n", "fs-b")
	f.Add("a.ko:\n", "alias [ a\nalias\n", "softdep a pre: a\n", "[")
	f.Fuzz(func(t *testing.T, dep, alias, softdep, name string) {
		files, err := modprobe.Find(fstest.MapFS{
			"modules.dep": {Data: []byte(dep)}, "modules.alias": {Data: []byte(alias)},
			"modules.softdep": {Data: []byte(softdep)},
		}, name)
		if err == nil && len(files) == 0 {
			t.Error("nothing, and no error")
		}
		for _, file := range files {
			if !strings.Contains(dep, file) {
				t.Errorf("%q is in no list", file)
			}
		}
	})
}
