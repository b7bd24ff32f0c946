package locate_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/locate"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/spec"
)

// program writes a script that says which Firecracker it is, and notes beside it that it was asked.
func program(t *testing.T, path, version string) string {
	t.Helper()
	text := fmt.Sprintf("#!/bin/sh\necho asked >>\"$0.asked\"\necho Firecracker v%s\n", version)
	err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path+".new", []byte(text), 0o755),
		os.Rename(path+".new", path))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// asked counts how often a program was.
func asked(path string) int {
	text, _ := os.ReadFile(path + ".asked")
	return strings.Count(string(text), "\n")
}

// dir is a directory without symbolic links in its path.
func dir(t *testing.T) string {
	t.Helper()
	d, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func none(context.Context, string) (string, error) { return "", fs.ErrNotExist }

func hintOf(err error) string {
	if h, ok := errors.AsType[interface {
		error
		Hint() string
	}](err); ok {
		return h.Hint()
	}
	return ""
}

func TestFinder_VMM(t *testing.T) {
	d := dir(t)
	path := program(t, filepath.Join(d, "firecracker-v1"), "1.12.1")
	link := filepath.Join(d, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	f := &locate.Finder{Binary: link, Installed: none}
	want := func(version firecracker.Version, times int) {
		t.Helper()
		got, err := f.VMM(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(locate.VMM{Path: path, Version: version}, got,
			cmpopts.IgnoreUnexported(locate.VMM{})); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if n := asked(path); n != times {
			t.Errorf("it was asked %d times, want %d", n, times)
		}
	}
	want(firecracker.Version{Major: 1, Minor: 12, Patch: 1}, 1)
	want(firecracker.Version{Major: 1, Minor: 12, Patch: 1}, 1) // nobody asks twice
	program(t, path, "1.16.0")
	want(firecracker.Version{Major: 1, Minor: 16}, 2) // but of another file
}

func TestFinder_VMMRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		version, err, hint string
		unsupported        bool
	}{
		"too old": {
			"1.6.0", "is Firecracker 1.6.0: not supported",
			"install Firecracker " + firecracker.MinVersion.String(), true,
		},
		"no VMM": {"Next", "vNext", "is it Firecracker? install Firecracker", false},
	} {
		f := &locate.Finder{Binary: program(t, filepath.Join(dir(t), "firecracker"), tt.version), Installed: none}
		got, err := f.VMM(t.Context())
		if err == nil || !strings.Contains(err.Error(), tt.err) || errors.Is(err, spec.ErrNotSupported) != tt.unsupported {
			t.Errorf("%s: %+v, %v, want %q", name, got, err, tt.err)
		}
		if got := hintOf(err); !strings.HasPrefix(got, tt.hint) {
			t.Errorf("%s: hint %q, want %q", name, got, tt.hint)
		}
	}
}

// A path or a name in PATH comes first, then a version that is wanted, then "firecracker" in PATH,
// then the newest installed.
func TestFinder_Find(t *testing.T) {
	d := dir(t)
	inPath := program(t, filepath.Join(d, "bin", "firecracker"), "1.12.1")
	named := program(t, filepath.Join(d, "bin", "other"), "1.12.1")
	installed := program(t, filepath.Join(d, "data", "firecracker"), "1.12.1")
	broken := errors.New("broken")
	for _, tt := range []struct {
		name             string
		binary, version  string
		path             string
		installed        func(version string) (string, error)
		want             string
		wantErr          error
		installedVersion string // that is asked for, "-" for none
	}{
		{"a path", named, "1.16.0", "bin", nil, named, nil, "-"},
		{"a name", "other", "", "bin", nil, named, nil, "-"},
		{"a name that is not there", "none", "", "bin", nil, "", exec.ErrNotFound, "-"},
		{"a path that is not there", filepath.Join(d, "none"), "", "bin", nil, "", fs.ErrNotExist, "-"},
		{"in PATH", "", "", "bin", nil, inPath, nil, "-"},
		{"a version", "", "1.16.0", "bin", func(string) (string, error) { return installed, nil }, installed, nil, "1.16.0"},
		{"a version that is not installed", "", "1.16.0", "bin", nil, "", fs.ErrNotExist, "1.16.0"},
		{"the newest", "", "", "empty", func(string) (string, error) { return installed, nil }, installed, nil, ""},
		{"nowhere", "", "", "empty", nil, "", exec.ErrNotFound, ""},
		{"installed in vain", "", "", "empty", func(string) (string, error) { return "", broken }, "", broken, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("PATH", filepath.Join(d, tt.path))
			version := "-"
			f := &locate.Finder{
				Binary: tt.binary, Version: tt.version,
				Installed: func(_ context.Context, v string) (string, error) {
					version = v
					if tt.installed == nil {
						return "", fs.ErrNotExist
					}
					return tt.installed(v)
				},
			}
			got, err := f.Find(t.Context())
			if got != tt.want || !errors.Is(err, tt.wantErr) || version != tt.installedVersion {
				t.Errorf("%q, %v, asked for %q, want %q, %v, %q", got, err, version, tt.want, tt.wantErr, tt.installedVersion)
			}
			if err != nil &&
				(!strings.HasPrefix(err.Error(), "find Firecracker: ") || !strings.Contains(hintOf(err), "--firecracker")) {
				t.Errorf("%v, hint %q", err, hintOf(err))
			}
		})
	}
	if n := asked(inPath) + asked(named) + asked(installed); n != 0 {
		t.Errorf("they were asked %d times for their version", n)
	}
}

func TestJailer(t *testing.T) {
	testenv.Require(t, testenv.Root)
	d := dir(t)
	path := program(t, filepath.Join(d, "with", "firecracker"), "1.12.1")
	beside := program(t, filepath.Join(d, "with", "jailer"), "1.12.1")
	alone := program(t, filepath.Join(d, "without", "firecracker"), "1.12.1")
	inPath := program(t, filepath.Join(d, "bin", "jailer"), "1.12.1")
	named := program(t, filepath.Join(d, "bin", "my-jailer"), "1.12.1")
	for _, tt := range []struct {
		name, vmm, jailer, path string
		want, err, hint         string
	}{
		{"beside", path, "", "bin", beside, "", ""},
		{"in PATH", alone, "", "bin", inPath, "", ""},
		{"named", path, "my-jailer", "bin", named, "", ""},
		{"named by path", path, named, "empty", named, "", ""},
		{"nowhere", alone, "", "empty", "", "find jailer: ", "--launcher direct"},
		{"for an odd name", filepath.Join(d, "with", "fc"), "", "bin", "", `takes no file named "fc"`, "must contain"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("PATH", filepath.Join(d, tt.path))
			got, err := locate.Jailer(locate.VMM{Path: tt.vmm}, tt.jailer)
			if got != tt.want || (err == nil) != (tt.err == "") {
				t.Fatalf("%q, %v, want %q", got, err, tt.want)
			}
			if err != nil && (!strings.Contains(err.Error(), tt.err) || !strings.Contains(hintOf(err), tt.hint)) {
				t.Errorf("%v, hint %q, want %q, %q", err, hintOf(err), tt.err, tt.hint)
			}
		})
	}
}

func TestJailer_NotRoot(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("we are root")
	}
	if _, err := locate.Jailer(locate.VMM{Path: "/bin/firecracker"}, ""); !errors.Is(err, fs.ErrPermission) ||
		!strings.Contains(hintOf(err), "--launcher direct") {
		t.Errorf("%v, want fs.ErrPermission", err)
	}
}

// install makes a program that says which Firecracker it is, and writes a line into the file asked
// for each question.
func install(t *testing.T, dir, version, format string) (path string) {
	t.Helper()
	path = filepath.Join(dir, "firecracker")
	script := fmt.Sprintf(
		"#!/bin/sh\necho \"$*\" >> '%s/asked'\ncase $1 in --version) echo Firecracker v%s;; *) echo v%s;; esac\n", dir,
		version, format)
	if err := os.WriteFile(path+".new", []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

// A program is asked for its version and its format once, and again when it was replaced.
func TestFinder_AsksOnce(t *testing.T) {
	dir := t.TempDir()
	var f locate.Finder
	for _, c := range []struct{ version, format, asked string }{
		{"1.16.1", "10.0.0", "--version --snapshot-version"},
		{"1.17.0", "11.0.0", "--version --snapshot-version --version --snapshot-version"},
	} {
		path := install(t, dir, c.version, c.format)
		for range 3 {
			b, err := f.At(t.Context(), path)
			if err != nil || b.Path != path || b.Version.String() != c.version {
				t.Fatalf("found %+v, %v, want version %s", b, err, c.version)
			}
			if format, err := f.SnapshotFormat(t.Context(), b); err != nil || format != c.format {
				t.Errorf("version %s: format %q, %v, want %q", c.version, format, err, c.format)
			}
		}
		asked, err := os.ReadFile(filepath.Join(dir, "asked"))
		if got := strings.Join(strings.Fields(string(asked)), " "); err != nil || got != c.asked {
			t.Errorf("asked %q, %v, want %q", got, err, c.asked)
		}
	}
}
