package share

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/treetar"
)

func (u *merger) conflict(t *target, name string) {
	if len(u.report.Conflicts) < maxNamed {
		u.report.Conflicts = append(u.report.Conflicts, filepath.Join(t.dir, name))
	}
}

// maxName is of a file, in bytes.
const maxName = 255

// beside is where the guest's version goes when the host's keeps the name. It is the same each
// time.
func (u *merger) beside(t *target, name string) string {
	dir, base := path.Split(name)
	if len(base)+len(u.Suffix) > maxName {
		sum := sha256.Sum256([]byte(base)) // names that begin alike stay different
		tag := "~" + hex.EncodeToString(sum[:4])
		base = base[:maxName-len(u.Suffix)-len(tag)]
		for r, n := utf8.DecodeLastRuneInString(base); r == utf8.RuneError &&
			n == 1; r, n = utf8.DecodeLastRuneInString(base) {
			base = base[:len(base)-1]
		}
		base += tag
	}
	to := dir + base + u.Suffix
	t.renamed[name] = to
	t.keep(to)
	return to
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
		if u.theirs(t, name, fi) {
			u.conflict(t, name)
			return nil
		}
		u.report.Removed++
		return u.replace(t, name, fi, func() error { return t.root.Remove(name) })
	}
	err = u.each(t, name, func(child string, _ fs.DirEntry) error { return u.remove(t, child) })
	if err != nil {
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

// replace does what takes a file's name away. If it has others, that is no change of the host's in
// them.
func (u *merger) replace(t *target, name string, fi fs.FileInfo, do func() error) error {
	if fi == nil || !fi.Mode().IsRegular() || fi.Sys().(*syscall.Stat_t).Nlink < 2 {
		return do()
	}
	f, err := t.root.OpenFile(name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := do(); err != nil {
		return err
	}
	now, err := f.Stat()
	if err == nil {
		u.ours[stampOf(now)] = true
	}
	return err
}

// each calls f for all that is in a directory. What fails is left.
func (u *merger) each(t *target, name string, f func(child string, e fs.DirEntry) error) error {
	if err := u.lend(t, name); err != nil {
		return err
	}
	d, err := t.root.Open(name)
	if err != nil {
		return err
	}
	entries, err := d.ReadDir(-1)
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	for _, e := range entries {
		child := path.Join(name, e.Name())
		if err := f(child, e); err != nil && u.fatal(err) {
			return err
		} else if err != nil {
			u.failed(filepath.Join(t.dir, child), err)
		}
	}
	return nil
}

func (u *merger) directory(t *target, name string, h *tar.Header) error {
	fi, err := t.root.Lstat(name)
	if err == nil && !fi.IsDir() {
		to, _, err := u.way(t, name, fi)
		if err != nil {
			return err
		}
		if to == name {
			u.report.Removed++
			err = u.replace(t, name, fi, func() error { return t.root.Remove(name) })
		} else if fi, statErr := t.root.Lstat(to); statErr == nil && !fi.IsDir() {
			err = &fs.PathError{Op: "mkdir", Path: to, Err: syscall.EEXIST}
		}
		if err != nil {
			return err
		}
		name = to
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := t.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	switch err := t.root.Mkdir(name, 0o700); {
	case err == nil:
		u.report.Written++
		if err := u.own(t, name, nil); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrExist):
		return err
	case h.PAXRecords[treetar.Opaque] != "":
		t.opaque[name] = true
	}
	u.dirs = append(u.dirs, dirMode{t, name, fs.FileMode(h.Mode) & fs.ModePerm})
	return nil
}

// finish removes what the guest has hidden, and gives directories their modes, the innermost first.
func (u *merger) finish() error {
	for _, t := range u.roots {
		for name := range t.opaque {
			if err := u.clear(t, name); err != nil && u.fatal(err) {
				return err
			} else if err != nil {
				u.failed(filepath.Join(t.dir, name), err)
			}
		}
	}
	if err := u.restore(); err != nil {
		return err
	}
	for _, d := range slices.Backward(u.dirs) {
		fi, err := d.t.root.Lstat(d.name)
		if err == nil && fi.IsDir() && fi.Mode().Perm() != d.mode {
			err = d.t.root.Chmod(d.name, d.mode|fi.Mode()&(fs.ModeSetgid|fs.ModeSticky))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			u.failed(filepath.Join(d.t.dir, d.name), err)
		}
	}
	return u.there()
}

// clear removes what is in a directory and is not the guest's.
func (u *merger) clear(t *target, name string) error {
	return u.each(t, name, func(child string, e fs.DirEntry) error {
		switch {
		case !t.kept[child]:
			return u.remove(t, child)
		case e.IsDir() && !t.opaque[child]:
			return u.clear(t, child)
		}
		return nil
	})
}

// tolerate takes it that a file system has no owners, modes or times, or does not let us set them:
// content matters more.
func tolerate(err error) error {
	for _, e := range []error{unix.EPERM, unix.ENOTSUP, unix.EINVAL} {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
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
	return tolerate(t.root.Lchown(name, int(st.Uid), int(st.Gid)))
}

// put writes a file or a symbolic link.
func (u *merger) put(t *target, name string, h *tar.Header, r io.Reader) error {
	return u.made(t, name, func(temp string) error {
		var err error
		if h.Typeflag == tar.TypeSymlink {
			err = t.root.Symlink(h.Linkname, temp)
		} else {
			err = treetar.WriteFile(t.root, temp, h.Size, r)
		}
		if err != nil {
			return err
		}
		return u.place(t, temp, name, h)
	})
}

// made lets f make and place a file that has another name first, which is gone then.
func (u *merger) made(t *target, name string, f func(temp string) error) error {
	if err := t.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	temp := path.Join(path.Dir(name), tempName())
	err := f(temp)
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

// way is where something goes: to its name, from which old gives way, or beside it, if the host has
// changed old. What it replaces is returned too, or nil.
func (u *merger) way(t *target, name string, old fs.FileInfo) (string, fs.FileInfo, error) {
	switch {
	case old == nil:
		return name, nil, nil
	case old.IsDir():
		if err := u.remove(t, name); err != nil {
			return "", nil, err
		}
		if _, err := t.root.Lstat(name); errors.Is(err, fs.ErrNotExist) {
			return name, nil, nil
		}
		// There is something of the host's in it.
	case !u.theirs(t, name, old):
		return name, old, nil
	}
	u.conflict(t, name)
	name = u.beside(t, name)
	if fi, err := t.root.Lstat(name); err == nil && fi.Mode().IsRegular() {
		return name, fi, nil
	}
	return name, nil, nil
}

// place gives what was written its name: unless it is what is there, which then stays, or the host
// has changed that.
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
			if old.Mode().IsRegular() && old.Mode().Perm() != mode && !u.theirs(t, name, old) {
				err = tolerate(t.root.Chmod(name, mode))
			}
			return errors.Join(err, t.root.Remove(temp))
		}
	} else {
		old = nil
	}
	name, old, err = u.way(t, name, old)
	if err != nil {
		return err
	}
	if err := u.own(t, temp, old); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeReg {
		if err := errors.Join(tolerate(t.root.Chmod(temp, mode)),
			tolerate(t.root.Chtimes(temp, h.ModTime, h.ModTime))); err != nil {
			return err
		}
	}
	u.report.Written++
	return u.replace(t, name, old, func() error { return t.root.Rename(temp, name) })
}

// equal says whether a file is what is there already. One that cannot be read is not.
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
	if errors.Is(err, fs.ErrPermission) {
		return false, nil
	}
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
	n, entry, ok := split(h.Linkname)
	if !ok || n != t.n {
		return treetar.ErrUnsafe
	}
	to, ok := t.name(entry)
	if !ok {
		return treetar.ErrUnsafe
	}
	to = t.now(to)
	if err := u.plainParents(t, to); err != nil {
		return err
	}
	fi, err := t.root.Lstat(to)
	if err != nil || !fi.Mode().IsRegular() {
		return errors.Join(err, treetar.ErrUnsafe)
	}
	old, err := t.root.Lstat(name)
	if err == nil && os.SameFile(old, fi) {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err != nil {
		old = nil
	}
	if name, old, err = u.way(t, name, old); err != nil {
		return err
	}
	if old != nil && os.SameFile(old, fi) {
		return nil // and a rename would leave both
	}
	return u.made(t, name, func(temp string) error {
		if err := t.root.Link(to, temp); err != nil {
			if err = u.copy(t, to, temp, fi); err != nil {
				return err
			}
		}
		u.report.Written++
		return u.replace(t, name, old, func() error { return t.root.Rename(temp, name) })
	})
}

// copy is for file systems that have no hard links, or no more to this file.
func (u *merger) copy(t *target, from, to string, fi fs.FileInfo) error {
	if err := u.charge(fi.Size()); err != nil {
		return err
	}
	f, err := t.root.OpenFile(from, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return errors.Join(treetar.WriteFile(t.root, to, fi.Size(), f), u.own(t, to, fi),
		tolerate(t.root.Chmod(to, fi.Mode().Perm())), tolerate(t.root.Chtimes(to, fi.ModTime(), fi.ModTime())))
}
