package ext4

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"
)

// ErrLayer says that an overlay has what no layer of an image can say.
var ErrLayer = errors.New("cannot be a layer of an image")

const (
	whiteout = ".wh."
	opaque   = whiteout + whiteout + ".opq"
	// overlay begins what overlayfs has noted.
	overlay = "SCHILY.xattr.trusted.overlay."
)

// Layer writes what is below a directory, which was the upper one of an overlay, as a layer of an
// OCI image: what overlayfs notes of names that are gone and of directories that hide others is
// said as layers do. Leave says which names are left out. Errors are those of Tar, and ErrLayer.
func (f *FS) Layer(ctx context.Context, w *tar.Writer, dir string, leave func(name string) bool, l Limits) error {
	t := &archiver{fs: f, ctx: ctx, w: w, left: l, names: map[uint32]string{}, dirs: map[uint32]bool{}, leave: leave}
	i, err := f.inode(rootInode)
	for part := range strings.SplitSeq(dir, "/") {
		if err == nil {
			i, err = f.lookup(i, part, l.Entries)
		}
	}
	if err == nil && i.mode&kindMask != kindDir {
		err = malformed("%q is no directory", dir)
	}
	if err == nil {
		err = t.add("", i)
	}
	if err == nil {
		err = w.Flush()
	}
	return err
}

func (f *FS) lookup(dir *inode, name string, most int64) (*inode, error) {
	if dir.mode&kindMask != kindDir {
		return nil, malformed("%q is in no directory", name)
	}
	all, err := f.entries(dir, most)
	if err != nil {
		return nil, err
	}
	for _, e := range all {
		if e.name == name {
			return f.inode(e.inode)
		}
	}
	return nil, malformed("it has no %q", name)
}

// inLayer has a name left out or says that it is gone. Done says that nothing is left to do for it.
func (t *archiver) inLayer(name string, i *inode) (done bool, err error) {
	switch {
	case t.leave == nil || name == "":
		return false, nil
	case t.leave(name):
		return true, nil
	case i.mode&kindMask == kindChar && le.Uint64(i.place) == 0:
		return true, t.mark(path.Join(path.Dir(name), whiteout+path.Base(name)), i.modified)
	case strings.HasPrefix(path.Base(name), whiteout):
		return true, fmt.Errorf("%w: a file is called %q", ErrLayer, name)
	}
	return false, nil
}

// noted takes what overlayfs has noted out of a header. Hides says that a directory hides what is
// below.
func (t *archiver) noted(h *tar.Header) (hides bool, err error) {
	if t.leave == nil {
		return false, nil
	}
	for key, value := range h.PAXRecords {
		note, ok := strings.CutPrefix(key, overlay)
		switch {
		case !ok:
			continue
		case note == "opaque" && value == "y":
			hides = true
		case note == "redirect", note == "metacopy":
			return false, fmt.Errorf("%w: %q is said to be elsewhere", ErrLayer, h.Name)
		}
		delete(h.PAXRecords, key)
	}
	return hides, nil
}

func (t *archiver) mark(name string, at time.Time) error {
	return t.w.WriteHeader(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: name, ModTime: at})
}
