package stage_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
)

func TestPlaceLinks(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	makeSparse(t, source, 10, piece{0, 10})
	root := filepath.Join(dir, "root")
	items := []stage.Item{{Source: source, Name: "kernel"}, {Source: source, Name: "drives/a", Writable: true}}
	if err := stage.PlaceLinks(root, items); err != nil {
		t.Fatal(err)
	}
	for _, it := range items {
		if got, err := os.Readlink(filepath.Join(root, it.Name)); err != nil || got != source {
			t.Errorf("%s leads to %q, %v", it.Name, got, err)
		}
	}
	if err := stage.PlaceLinks(root, items[:1]); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), source) {
		t.Errorf("placed twice: %v", err)
	}
}

const vmmUser = 1_900_000_001

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Ino
}

// fileName is what store.DriveName calls the file at path.
func fileName(t *testing.T, path string) string {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return store.DriveName(fi)
}

// swap puts a file of root's in the place of the one at path, as the owner of its directory can: by
// a name or by a link.
func swap(t *testing.T, path string, byLink bool) (roots string) {
	t.Helper()
	roots = path + "-of-root"
	err := errors.Join(os.WriteFile(roots, nil, 0o600), os.Rename(path, path+"-away"))
	if byLink {
		err = errors.Join(err, os.Symlink(roots, path))
	} else {
		err = errors.Join(err, os.Link(roots, path))
	}
	if err != nil {
		t.Fatal(err)
	}
	return roots
}

// Whoever owns a drive's directory cannot have root give a VMM another file than the one that was
// leased.
func TestOwner_Swapped(t *testing.T) {
	testenv.Require(t, testenv.Root)
	for name, byLink := range map[string]bool{"by name": false, "by link": true} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "drive")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			o, err := stage.NewOwner(path, fileName(t, path), vmmUser)
			if err != nil {
				t.Fatal(err)
			}
			roots := swap(t, path, byLink)
			if _, err := stage.NewOwner(path, o.File, vmmUser); !errors.Is(err, stage.ErrReplaced) {
				t.Errorf("described: %v, want ErrReplaced", err)
			}
			if err := o.Apply(t.Context()); !errors.Is(err, stage.ErrReplaced) {
				t.Errorf("lent: %v, want ErrReplaced", err)
			}
			wantOwner(t, roots, 0)
			wantOwner(t, path+"-away", 0)
			// Nor have it given to the drive's owner.
			o.WasUID, o.WasGID = 5, 5
			if err := errors.Join(os.Chown(roots, vmmUser, vmmUser), o.Revert(t.Context())); err != nil {
				t.Error(err)
			}
			wantOwner(t, roots, vmmUser)
			// A journal of an older version does not tell which file it was: then it is known by its owner,
			// links apart.
			o.File = ""
			if err := o.Revert(t.Context()); err != nil {
				t.Error(err)
			}
			wantOwner(t, roots, map[bool]uint32{false: 5, true: vmmUser}[byLink])
		})
	}
}

func TestPlaceJailed_Swapped(t *testing.T) {
	testenv.Require(t, testenv.Root)
	dir := t.TempDir()
	path := filepath.Join(dir, "drive")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	item := stage.Item{Source: path, Name: "drive", Writable: true, File: fileName(t, path)}
	if _, err := stage.PlaceJailed(t.Context(), filepath.Join(dir, "well"), vmmUser, []stage.Item{item}); err != nil {
		t.Fatal(err)
	}
	bind := stage.Bind{Target: path, File: item.File}
	if err := bind.Check(); err != nil {
		t.Errorf("a bind that shows the file: %v", err)
	}
	swap(t, path, true)
	if err := bind.Check(); !errors.Is(err, stage.ErrReplaced) {
		t.Errorf("a bind that shows another: %v, want ErrReplaced", err)
	}
	root := filepath.Join(dir, "root")
	if _, err := stage.PlaceJailed(t.Context(), root, vmmUser, []stage.Item{item}); !errors.Is(err, stage.ErrReplaced) {
		t.Errorf("%v, want ErrReplaced", err)
	}
	if _, err := os.Lstat(filepath.Join(root, "drive")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was placed: %v", err)
	}
}

func TestPlaceJailed(t *testing.T) {
	testenv.Require(t, testenv.Root)
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"public", "private", "own"} {
		makeSparse(t, path(name), 1<<20, piece{0, 10})
	}
	err := errors.Join(
		os.Chmod(path("public"), 0o644), os.Chmod(path("private"), 0o640),
		os.Chmod(path("own"), 0o600), os.Chown(path("own"), vmmUser, vmmUser),
		os.Symlink(path("public"), path("link")),
		unix.Mknod(path("device"), unix.S_IFBLK|0o660, int(unix.Mkdev(7, 200))),
	)
	if err != nil {
		t.Fatal(err)
	}
	root := path("root")
	defer unix.Umask(unix.Umask(0o077))
	binds, err := stage.PlaceJailed(t.Context(), root, vmmUser, []stage.Item{
		{Source: path("public"), Name: "kernel"},
		{Source: path("link"), Name: "drives/link"},
		{Source: path("private"), Name: "drives/private"},
		{Source: path("own"), Name: "drives/own", Writable: true},
		{Source: path("device"), Name: "drives/device", Writable: true},
	})
	if err != nil || len(binds) > 0 {
		t.Fatalf("binds %+v, %v", binds, err)
	}
	for placed, source := range map[string]string{"kernel": "public", "drives/link": "public", "drives/own": "own"} {
		if inode(t, filepath.Join(root, placed)) != inode(t, path(source)) {
			t.Errorf("%s is not a link to %s", placed, source)
		}
	}
	wantOwner(t, path("public"), 0)
	if fi, err := os.Stat(filepath.Join(root, "drives")); err != nil || fi.Mode() != fs.ModeDir|0o755 {
		t.Errorf("the VMM's user cannot come to its drives: %v, %v", fi.Mode(), err)
	}
	// What others may not read is copied: its mode and owner stay.
	copied := filepath.Join(root, "drives/private")
	if inode(t, copied) == inode(t, path("private")) {
		t.Error("a file that its owner keeps to himself was linked")
	}
	wantOwner(t, copied, vmmUser)
	wantOwner(t, path("private"), 0)
	want, err := os.ReadFile(path("private"))
	if got, gotErr := os.ReadFile(copied); err != nil || gotErr != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy differs: %v, %v", err, gotErr)
	}
	node := filepath.Join(root, "drives/device")
	wantOwner(t, node, vmmUser)
	wantOwner(t, path("device"), 0)
	fi, err := os.Lstat(node)
	if err != nil {
		t.Fatal(err)
	}
	if st := fi.Sys().(*syscall.Stat_t); fi.Mode() != fs.ModeDevice|0o600 || st.Rdev != unix.Mkdev(7, 200) {
		t.Errorf("device node: mode %v, device %x", fi.Mode(), st.Rdev)
	}
	if _, err := stage.PlaceJailed(t.Context(), root, vmmUser,
		[]stage.Item{{Source: path("public"), Name: "kernel"}}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("placed twice: %v", err)
	}
	if _, err := stage.PlaceJailed(t.Context(), root, vmmUser,
		[]stage.Item{{Source: path("missing"), Name: "x"}}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no source: %v", err)
	}
}

// From another file system there is no hard link: the caller is to mount.
func TestPlaceJailed_AcrossFileSystems(t *testing.T) {
	if !testenv.Apart(t) {
		return
	}
	dir := t.TempDir()
	other := filepath.Join(dir, "other")
	mountTmpfs(t, other, "size=1m")
	source := filepath.Join(dir, "source")
	makeSparse(t, source, 10, piece{0, 10})
	if err := os.Chmod(source, 0o644); err != nil {
		t.Fatal(err)
	}
	binds, err := stage.PlaceJailed(t.Context(), filepath.Join(other, "root"), vmmUser, []stage.Item{
		{Source: source, Name: "kernel"}, {Source: source, Name: "drives/a", Writable: true},
	})
	want := []stage.Bind{
		{Source: source, Target: filepath.Join(other, "root/kernel"), ReadOnly: true},
		{Source: source, Target: filepath.Join(other, "root/drives/a")},
	}
	if diff := cmp.Diff(want, binds); err != nil || diff != "" {
		t.Fatalf("%v\n-want +got:\n%s", err, diff)
	}
	for _, b := range binds {
		if fi, err := os.Lstat(b.Target); err != nil || !fi.Mode().IsRegular() || fi.Size() > 0 {
			t.Errorf("%s: %v, %v, want an empty file to mount on", b.Target, fi, err)
		}
	}
}

func TestTree(t *testing.T) {
	tree := &stage.Tree{Path: filepath.Join(t.TempDir(), "tree")}
	if err := tree.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(tree.Path); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi, err)
	}
	if err := tree.Apply(t.Context()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("made twice: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(tree.Path, "a/b/c"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := tree.Revert(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(tree.Path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it stays: %v", err)
	}
}

func TestLink(t *testing.T) {
	link := &stage.Link{Path: filepath.Join(t.TempDir(), "link"), Target: "/nowhere/ours"}
	if err := link.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := link.Apply(t.Context()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("made twice: %v", err)
	}
	for range 2 {
		if err := link.Revert(t.Context()); err != nil {
			t.Error(err)
		}
	}
	for name, foreign := range map[string]func() error{
		"link":      func() error { return os.Symlink("/nowhere/theirs", link.Path) },
		"file":      func() error { return os.WriteFile(link.Path, nil, 0o600) },
		"directory": func() error { return os.Mkdir(link.Path, 0o700) },
	} {
		if err := foreign(); err != nil {
			t.Fatal(err)
		}
		if err := link.Apply(t.Context()); !errors.Is(err, fs.ErrExist) {
			t.Errorf("over a foreign %s: %v", name, err)
		}
		if err := link.Revert(t.Context()); err != nil {
			t.Errorf("revert with a foreign %s: %v", name, err)
		}
		if err := os.Remove(link.Path); err != nil {
			t.Errorf("the foreign %s is gone: %v", name, err)
		}
	}
}

func TestOwner(t *testing.T) {
	testenv.Require(t, testenv.Root)
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "file")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chown(path, 5, 6)); err != nil {
		t.Fatal(err)
	}
	o, err := stage.NewOwner(path, fileName(t, path), vmmUser)
	if err != nil {
		t.Fatal(err)
	}
	want := &stage.Owner{Path: path, File: fileName(t, path), UID: vmmUser, GID: vmmUser, WasUID: 5, WasGID: 6}
	if diff := cmp.Diff(want, o); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if err := o.Apply(ctx); err != nil {
		t.Fatal(err)
	}
	wantOwner(t, path, vmmUser)
	for range 2 {
		if err := o.Revert(ctx); err != nil {
			t.Error(err)
		}
	}
	fi, err := os.Stat(path)
	if st := fi.Sys().(*syscall.Stat_t); err != nil || st.Uid != 5 || st.Gid != 6 {
		t.Errorf("it belongs to %d:%d afterwards, %v", st.Uid, st.Gid, err)
	}
	// Somebody gave it to somebody else meanwhile.
	if err := errors.Join(o.Apply(ctx), os.Chown(path, 7, 7), o.Revert(ctx)); err != nil {
		t.Error(err)
	}
	wantOwner(t, path, 7)
	if err := errors.Join(os.Remove(path), o.Revert(ctx)); err != nil {
		t.Errorf("of a file that is gone: %v", err)
	}
	if _, err := stage.NewOwner(path, "", 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no file: %v", err)
	}
	if err := o.Apply(context.Background()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("lend no file: %v", err)
	}
}
