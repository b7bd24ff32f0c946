package share

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/treetar"
	"push.rocks/smartvm/spec"
)

// Merge is what copies changes back.
type Merge struct {
	Volumes  []spec.Volume
	Told     []guest.Volume // what the guest was told of each
	Copied   string         // the file in which Image noted what it copied; what is not noted is the host's own
	Suffix   string         // is added to the name of what is put beside what the host has changed
	MaxBytes int64          // of all that the guest's files have, holes included
}

// maxEntries bounds what a guest has changed, in files.
const maxEntries = 1 << 19

// maxNamed bounds the conflicts and the failures that are told by name.
const maxNamed = 100

// Report says what was done on the host.
type Report struct {
	Written, Removed int
	Conflicts        []string  // paths that the host has changed too: its version stays. At most 100
	Failed           []Failure // what could not be copied back. At most 100
	Failures         int       // all of them
	Left             int       // what is no file, directory or link
}

// Failure is one file's.
type Failure struct {
	Path string // on the host
	Err  error
}

// Log tells what did not come back as the guest has it.
func (r *Report) Log(log *slog.Logger) {
	for _, path := range r.Conflicts {
		log.Warn("the host has changed it too, and its version stays", "path", path)
	}
	for _, f := range r.Failed {
		log.Warn("not copied back", "path", f.Path, "err", f.Err)
	}
	if more := r.Failures - len(r.Failed); more > 0 {
		log.Warn("not copied back", "more", more)
	}
	log.Info("copied back", "written", r.Written, "removed", r.Removed, "left", r.Left)
}

// LimitError means that a guest has more than is copied back.
type LimitError struct{ Limit string }

func (e *LimitError) Error() string { return "the guest has changed more than " + e.Limit }

// Check says whether the volumes' sources are there, and can be written.
func (m Merge) Check() error {
	u := &merger{Merge: m, roots: map[int]*target{}}
	return errors.Join(u.open(), u.close())
}

// Apply copies back what the archive in r has: the layers of overlayfs in which the guest has
// written, which it made and which is not trusted. Nothing is written outside the volumes' sources,
// no link is followed, no device made, no set-user-id bit set. Files that exist keep their owners,
// new ones belong to who owns their directory. What cannot be copied back is left, and told in the
// report; an error means that the rest may come when Apply is called again, which changes nothing
// that is done already.
func (m Merge) Apply(ctx context.Context, r io.Reader) (report Report, err error) {
	u := &merger{Merge: m, report: &report, roots: map[int]*target{}, ours: map[stamp]bool{}}
	defer func() { err = errors.Join(err, u.restore(), u.close()) }()
	if u.copied, err = readStamps(m.Copied); err != nil {
		return report, fmt.Errorf("copy back: %w", err)
	}
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
		content := &source{r: tr}
		if err := u.entry(h, content); err != nil && (content.err != nil || u.fatal(err)) {
			return report, fmt.Errorf("copy back %q: %w", h.Name, err)
		} else if err != nil {
			u.fail(h, err)
		}
	}
}

// source remembers that an archive cannot be read, which is not the fault of one of its files.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// fatal says whether an error will be another file's too, and may be mended: what is lacking is not
// given up then.
func (u *merger) fatal(err error) bool {
	for _, e := range []error{unix.ENOSPC, unix.EDQUOT, unix.EIO, unix.ESTALE, unix.ENOMEM, unix.EMFILE, unix.ENFILE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return u.there() != nil
}

// fail leaves an entry.
func (u *merger) fail(h *tar.Header, err error) {
	n, name, _ := split(h.Name)
	at := filepath.Join(u.roots[n].root.Name(), name)
	if len(name) > 4096 {
		at = at[:4096]
	}
	u.failed(at, err)
}

func (u *merger) failed(path string, err error) {
	if u.report.Failures++; len(u.report.Failed) < maxNamed {
		u.report.Failed = append(u.report.Failed, Failure{path, err})
	}
}

type merger struct {
	Merge
	report *Report
	copied stamps
	ours   map[stamp]bool // files that are as this merge has left them
	bytes  int64
	roots  map[int]*target
	dirs   []dirMode // that the guest has
	lent   []dirMode // that were made writable for a while
}

func (u *merger) open() (err error) {
	for n, v := range u.Volumes {
		if !v.Sync {
			continue
		}
		t := &target{n: n, dir: v.Source, renamed: map[string]string{}, opaque: map[string]bool{}, kept: map[string]bool{}}
		if u.Told[n].IsFile {
			t.dir, t.file = filepath.Dir(v.Source), filepath.Base(v.Source)
		}
		if t.root, err = os.OpenRoot(t.dir); err != nil {
			return fmt.Errorf("copy back: %w", err)
		}
		u.roots[n] = t
	}
	return u.there()
}

// there says whether the sources are still where they were, and can be written, if need be after
// their owner has made them so.
func (u *merger) there() error {
	for _, t := range u.roots {
		here, err := t.root.Stat(".")
		if err != nil {
			return fmt.Errorf("copy back: %w", err)
		}
		if named, err := os.Stat(t.dir); err != nil || !os.SameFile(here, named) {
			return fmt.Errorf("copy back: %w", cmp.Or(err, error(&fs.PathError{Op: "stat", Path: t.dir, Err: unix.ESTALE})))
		}
		err = unix.Access(t.dir, unix.W_OK|unix.X_OK)
		if err != nil && (!errors.Is(err, unix.EACCES) || int(here.Sys().(*syscall.Stat_t).Uid) != os.Geteuid()) {
			return fmt.Errorf("copy back: %w", &fs.PathError{Op: "write", Path: t.dir, Err: err})
		}
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
	n       int
	dir     string
	root    *os.Root          // of dir
	file    string            // all there is of it, if not ""
	renamed map[string]string // what was put beside a name
	opaque  map[string]bool   // directories of which only what the guest has stays
	kept    map[string]bool   // what it has in those
}

// keep remembers that the guest has a name.
func (t *target) keep(name string) {
	if len(t.opaque) == 0 {
		return
	}
	for at := name; at != "."; at = path.Dir(at) {
		if t.opaque[at] {
			for ; name != at; name = path.Dir(name) {
				t.kept[name] = true
			}
			return
		}
	}
}

// dirMode is what a directory gets when all is in it.
type dirMode struct {
	t    *target
	name string
	mode fs.FileMode
}

// split takes the name of an archive's entry apart: NUMBER/UPPER/PATH.
func split(entry string) (n int, name string, ok bool) {
	parts := strings.SplitN(strings.TrimSuffix(entry, "/"), "/", 3)
	n, err := strconv.Atoi(parts[0])
	if err != nil || len(parts) < 3 || parts[1] != guest.UpperDir {
		return 0, "", false
	}
	return n, parts[2], true
}

// entry takes one of the archive's.
func (u *merger) entry(h *tar.Header, r io.Reader) error {
	n, entry, ok := split(h.Name)
	t := u.roots[n]
	if !ok || t == nil {
		return nil
	}
	name, ok := t.name(entry)
	if !ok {
		return treetar.ErrUnsafe
	}
	if name == "" {
		return nil
	}
	if h.Typeflag == tar.TypeReg {
		if err := u.charge(h.Size); err != nil {
			return err
		}
	}
	name = t.now(name)
	t.keep(name)
	if err := u.plainParents(t, name); err != nil {
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

// charge counts what a file takes, and refuses what is too much with those before.
func (u *merger) charge(size int64) error {
	if size > u.MaxBytes-u.bytes {
		return &LimitError{fmt.Sprintf("%d MiB", u.MaxBytes>>20)}
	}
	u.bytes += size
	return nil
}

// name is an entry's on the host, "" for one that is not taken.
func (t *target) name(name string) (string, bool) {
	if t.file == "" {
		return name, filepath.IsLocal(name) && path.Clean(name) == name && name != "."
	}
	if name != guest.VolumeFile {
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

// plainParents refuses to go through a symbolic link, though it may lead back into the volume, and
// makes the way writable.
func (u *merger) plainParents(t *target, name string) error {
	if err := u.lend(t, "."); err != nil {
		return err
	}
	for i := range len(name) {
		if name[i] != '/' {
			continue
		}
		if err := u.lend(t, name[:i]); errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}

// lend makes a directory one that this process can change, as its owner may, until restore.
func (u *merger) lend(t *target, name string) error {
	fi, err := t.root.Lstat(name)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s is no directory: %w", name, treetar.ErrUnsafe)
	}
	const all = 0o700
	if fi.Mode().Perm()&all == all || int(fi.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() || os.Geteuid() == 0 {
		return nil
	}
	if err := t.root.Chmod(name, fi.Mode()|all); err != nil {
		return err
	}
	u.lent = append(u.lent, dirMode{t, name, fi.Mode()})
	return nil
}

// restore gives back what lend has taken.
func (u *merger) restore() (err error) {
	for _, d := range slices.Backward(u.lent) {
		if chmod := d.t.root.Chmod(d.name, d.mode); chmod != nil && !errors.Is(chmod, fs.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("copy back: %w", chmod))
		}
	}
	u.lent = nil
	return err
}

// theirs says whether a file is not the one that was copied, or that this merge has left.
func (u *merger) theirs(t *target, name string, fi fs.FileInfo) bool {
	s := stampOf(fi)
	was, noted := u.copied[keyOf(t.n, name)]
	return (!noted || was != s) && !u.ours[s]
}
