package share

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/treetar"
	"push.rocks/smartvm/spec"
)

// Pending says that a VM may have changes that are not yet copied back.
type Pending struct {
	Taken time.Time `json:"taken"` // when the copies were begun: what the host has changed since is its own
}

// Merge is what copies changes back.
type Merge struct {
	Volumes  []spec.Volume
	Told     []agentproto.Volume // what the guest was told of each
	Taken    time.Time
	Suffix   string // is added to the name of what is put beside what the host has changed
	MaxBytes int64  // of all that the guest's files have
}

// maxEntries bounds what a guest has changed, in files.
const maxEntries = 1 << 19

// maxConflicts bounds those that are told by name.
const maxConflicts = 100

// Report says what was done on the host.
type Report struct {
	Written, Removed int
	Conflicts        []string // paths that the host has changed too: its version stays. At most 100
	Left             int      // what is no file, directory or link
}

// LimitError means that a guest has more than is copied back.
type LimitError struct{ Limit string }

func (e *LimitError) Error() string { return "the guest has changed more than " + e.Limit }

// Check says whether the volumes' sources are there.
func (m Merge) Check() error {
	u := &merger{Merge: m, roots: map[int]*target{}}
	return errors.Join(u.open(), u.close())
}

// Apply copies back what the archive in r has: the layers of overlayfs in which the guest has written, which it made and which is not
// trusted. Nothing is written outside the volumes' sources, no link is followed, no device made, no set-user-id bit set. Files that exist keep their owners, new ones
// belong to who owns their directory. Again, it changes nothing.
func (m Merge) Apply(ctx context.Context, r io.Reader) (report Report, err error) {
	u := &merger{Merge: m, report: &report, roots: map[int]*target{}}
	defer func() { err = errors.Join(err, u.close()) }()
	if err := u.open(); err != nil {
		return report, err
	}
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return report, u.finish()
		case err != nil:
			return report, fmt.Errorf("copy back: %w", err)
		case ctx.Err() != nil:
			return report, context.Cause(ctx)
		case n >= maxEntries:
			return report, &LimitError{fmt.Sprint(maxEntries, " files")}
		}
		if err := u.entry(h, tr); err != nil {
			return report, fmt.Errorf("copy back %q: %w", h.Name, err)
		}
	}
}

type merger struct {
	Merge
	report *Report
	bytes  int64
	roots  map[int]*target
	dirs   []dirMode
}

func (u *merger) open() (err error) {
	for n, v := range u.Volumes {
		if !v.Sync {
			continue
		}
		t := &target{renamed: map[string]string{}}
		dir := v.Source
		if u.Told[n].IsFile {
			dir, t.file = filepath.Dir(v.Source), filepath.Base(v.Source)
		}
		if t.root, err = os.OpenRoot(dir); err != nil {
			return fmt.Errorf("copy back: %w", err)
		}
		u.roots[n] = t
	}
	return nil
}

func (u *merger) close() (err error) {
	for _, t := range u.roots {
		err = errors.Join(err, t.root.Close())
	}
	return err
}

// target is one volume's source.
type target struct {
	root    *os.Root
	file    string            // all there is of it, if not ""
	renamed map[string]string // what was put beside a name
}

// dirMode is what a directory gets when all is in it.
type dirMode struct {
	t    *target
	name string
	mode fs.FileMode
}

// entry takes one of the archive's: its name is NUMBER/UPPER/PATH.
func (u *merger) entry(h *tar.Header, r io.Reader) error {
	parts := strings.SplitN(strings.TrimSuffix(h.Name, "/"), "/", 3)
	n, err := strconv.Atoi(parts[0])
	t := u.roots[n]
	if err != nil || len(parts) < 3 || parts[1] != agentproto.UpperDir || t == nil {
		return nil
	}
	if u.bytes += h.Size; h.Typeflag == tar.TypeReg && u.bytes > u.MaxBytes {
		return &LimitError{fmt.Sprintf("%d MiB", u.MaxBytes>>20)}
	}
	name, ok := t.name(parts[2])
	if !ok {
		return treetar.ErrUnsafe
	}
	if name == "" {
		return nil
	}
	name = t.now(name)
	if err := t.plainParents(name); err != nil {
		return err
	}
	whiteout := h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0
	switch {
	case whiteout && t.file == "":
		return u.remove(t, name)
	case h.Typeflag == tar.TypeDir && t.file == "":
		return u.directory(t, name, h)
	case h.Typeflag == tar.TypeReg, h.Typeflag == tar.TypeSymlink && t.file == "":
		return u.put(t, name, h, r)
	case h.Typeflag == tar.TypeLink && t.file == "":
		return u.link(t, name, h)
	}
	u.report.Left++
	return nil
}

// name is an entry's on the host, "" for one that is not taken.
func (t *target) name(name string) (string, bool) {
	if t.file == "" {
		return name, filepath.IsLocal(name) && path.Clean(name) == name && name != "."
	}
	if name != agentproto.VolumeFile {
		return "", true
	}
	return t.file, true
}

// now is where something is that was put beside its name, or is in a directory that was.
func (t *target) now(name string) string {
	for at := name; len(t.renamed) > 0 && at != "."; at = path.Dir(at) {
		if to, moved := t.renamed[at]; moved {
			return to + name[len(at):]
		}
	}
	return name
}

// plainParents refuses to go through a symbolic link, though it may lead back into the volume.
func (t *target) plainParents(name string) error {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		fi, err := t.root.Lstat(dir)
		if err == nil && !fi.IsDir() {
			return fmt.Errorf("%s is no directory: %w", dir, treetar.ErrUnsafe)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// theirs says whether the host has changed a file since the copies were made. Its time of change cannot be set by anybody.
func (u *merger) theirs(fi fs.FileInfo) bool {
	st := fi.Sys().(*syscall.Stat_t)
	return time.Unix(st.Ctim.Unix()).After(u.Taken)
}

func (u *merger) conflict(t *target, name string) {
	if len(u.report.Conflicts) < maxConflicts {
		u.report.Conflicts = append(u.report.Conflicts, filepath.Join(t.root.Name(), name))
	}
}

// remove removes what the guest has removed, but for what the host has changed.
func (u *merger) remove(t *target, name string) error {
	fi, err := t.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		if u.theirs(fi) {
			u.conflict(t, name)
			return nil
		}
		u.report.Removed++
		return t.root.Remove(name)
	}
	if err := u.empty(t, name); err != nil {
		return err
	}
	err = t.root.Remove(name)
	if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST) {
		return nil // of the host's
	}
	if err == nil {
		u.report.Removed++
	}
	return err
}

// empty removes all that is in a directory.
func (u *merger) empty(t *target, name string) error {
	d, err := t.root.Open(name)
	if err != nil {
		return err
	}
	entries, err := d.ReadDir(-1)
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	for _, e := range entries {
		if err := u.remove(t, path.Join(name, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (u *merger) directory(t *target, name string, h *tar.Header) error {
	fi, err := t.root.Lstat(name)
	if err == nil && !fi.IsDir() {
		if u.theirs(fi) {
			u.conflict(t, name)
			t.renamed[name] = name + u.Suffix // and all that is in it
			return u.directory(t, name+u.Suffix, h)
		}
		if err := t.root.Remove(name); err != nil {
			return err
		}
		err = fs.ErrNotExist
	}
	mode := fs.FileMode(h.Mode) & fs.ModePerm
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := t.root.MkdirAll(path.Dir(name), 0o755); err != nil {
			return err
		}
		if err := t.root.Mkdir(name, 0o700); err != nil {
			return err
		}
		u.report.Written++
		if err := u.own(t, name, nil); err != nil {
			return err
		}
	case err != nil:
		return err
	case h.PAXRecords[treetar.Opaque] != "":
		if err := u.empty(t, name); err != nil {
			return err
		}
	}
	u.dirs = append(u.dirs, dirMode{t, name, mode})
	return nil
}

// finish gives directories their modes, the innermost first.
func (u *merger) finish() error {
	for i := len(u.dirs) - 1; i >= 0; i-- {
		d := u.dirs[i]
		fi, err := d.t.root.Lstat(d.name)
		if err == nil && fi.IsDir() && fi.Mode().Perm() != d.mode {
			err = d.t.root.Chmod(d.name, d.mode|fi.Mode()&(fs.ModeSetgid|fs.ModeSticky))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("copy back: %w", err)
		}
	}
	return nil
}

// own gives a new file the owner of what it replaces, or else of its directory.
func (u *merger) own(t *target, name string, old fs.FileInfo) error {
	if os.Geteuid() != 0 {
		return nil
	}
	if old == nil {
		var err error
		if old, err = t.root.Lstat(path.Dir(name)); err != nil {
			return err
		}
	}
	st := old.Sys().(*syscall.Stat_t)
	return t.root.Lchown(name, int(st.Uid), int(st.Gid))
}

// put writes a file or a symbolic link.
func (u *merger) put(t *target, name string, h *tar.Header, r io.Reader) error {
	if err := t.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	temp := path.Join(path.Dir(name), tempName())
	var err error
	if h.Typeflag == tar.TypeSymlink {
		err = t.root.Symlink(h.Linkname, temp)
	} else {
		err = treetar.WriteFile(t.root, temp, h.Size, r)
	}
	if err == nil {
		err = u.place(t, temp, name, h)
	}
	if err != nil {
		if gone := t.root.Remove(temp); !errors.Is(gone, fs.ErrNotExist) {
			err = errors.Join(err, gone)
		}
	}
	return err
}

// tempName is nobody's: a guest cannot know it, nor anybody wait for it.
func tempName() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails
	return ".smartvm-" + hex.EncodeToString(b)
}

// place gives what was written its name: unless it is what is there, which then stays, or the host has changed that.
func (u *merger) place(t *target, temp, name string, h *tar.Header) error {
	old, err := t.root.Lstat(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	mode := fs.FileMode(h.Mode) & fs.ModePerm
	if err == nil {
		same, err := t.equal(temp, name, old, h)
		if err != nil {
			return err
		}
		if same {
			if old.Mode().IsRegular() && old.Mode().Perm() != mode && !u.theirs(old) {
				err = t.root.Chmod(name, mode)
			}
			return errors.Join(err, t.root.Remove(temp))
		}
		switch {
		case u.theirs(old) && !old.IsDir():
			u.conflict(t, name)
			t.renamed[name] = name + u.Suffix
			name += u.Suffix
			if old, err = t.root.Lstat(name); err != nil || !old.Mode().IsRegular() {
				old = nil
			}
		case old.IsDir():
			if err := u.remove(t, name); err != nil {
				return err
			}
			if _, err := t.root.Lstat(name); err == nil { // there is something of the host's in it
				u.conflict(t, name)
				t.renamed[name] = name + u.Suffix
				name += u.Suffix
			}
			old = nil
		}
	} else {
		old = nil
	}
	if err := u.own(t, temp, old); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeReg {
		if err := errors.Join(t.root.Chmod(temp, mode), t.root.Chtimes(temp, h.ModTime, h.ModTime)); err != nil {
			return err
		}
	}
	u.report.Written++
	return t.root.Rename(temp, name)
}

// equal says whether a file is what is there already.
func (t *target) equal(temp, name string, old fs.FileInfo, h *tar.Header) (bool, error) {
	switch {
	case h.Typeflag == tar.TypeSymlink && old.Mode()&fs.ModeSymlink != 0:
		to, err := t.root.Readlink(name)
		return to == h.Linkname, err
	case h.Typeflag != tar.TypeReg || !old.Mode().IsRegular() || old.Size() != h.Size:
		return false, nil
	}
	a, err := t.root.Open(temp)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := t.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return false, err
	}
	defer b.Close()
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, errA := io.ReadFull(a, x)
		k, errB := io.ReadFull(b, y)
		if n != k || !bytes.Equal(x[:n], y[:k]) {
			return false, nil
		}
		if errA != nil {
			return errors.Is(errB, errA), ignoreEnd(errA)
		}
	}
}

func ignoreEnd(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// link makes another name of a file that came before.
func (u *merger) link(t *target, name string, h *tar.Header) error {
	parts := strings.SplitN(h.Linkname, "/", 3)
	own, _, _ := strings.Cut(h.Name, "/")
	if len(parts) < 3 || parts[0] != own || parts[1] != agentproto.UpperDir {
		return treetar.ErrUnsafe
	}
	to, ok := t.name(parts[2])
	if !ok {
		return treetar.ErrUnsafe
	}
	to = t.now(to)
	if err := t.plainParents(to); err != nil {
		return err
	}
	fi, err := t.root.Lstat(to)
	if err != nil || !fi.Mode().IsRegular() {
		return errors.Join(err, treetar.ErrUnsafe)
	}
	old, err := t.root.Lstat(name)
	switch {
	case err == nil && os.SameFile(old, fi):
		return nil
	case err == nil && (old.IsDir() || u.theirs(old)):
		u.conflict(t, name)
		name += u.Suffix
	}
	if err := t.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	temp := path.Join(path.Dir(name), tempName())
	if err := t.root.Link(to, temp); err != nil {
		return err
	}
	u.report.Written++
	if err := t.root.Rename(temp, name); err != nil {
		return errors.Join(err, t.root.Remove(temp))
	}
	return nil
}
