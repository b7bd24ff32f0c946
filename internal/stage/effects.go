package stage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/store"
)

// Tree is a directory of ours and all that is ever put below it. Its parent must be ours alone.
type Tree struct {
	Path string `json:"path"`
}

func (t *Tree) Apply(context.Context) error {
	if err := os.Mkdir(t.Path, 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	return nil
}

func (t *Tree) Revert(context.Context) error {
	if err := os.RemoveAll(t.Path); err != nil {
		return fmt.Errorf("remove directory: %w", err)
	}
	return nil
}

// Content is a small file. Its directory must be ours alone.
type Content struct {
	Path string `json:"path"`
	Text string `json:"text"`
	Size int64  `json:"size"` // bytes, zeros after the text
}

func (c *Content) Apply(context.Context) error {
	f, err := os.OpenFile(c.Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644) // a VMM in a jail is another user
	if err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	_, err = f.WriteString(c.Text)
	if err = errors.Join(err, f.Truncate(c.Size), f.Chmod(0o644), f.Close()); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return nil
}

func (c *Content) Revert(context.Context) error {
	if err := os.Remove(c.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove file: %w", err)
	}
	return nil
}

// Link is a symbolic link at a place that others may write too.
type Link struct {
	Path   string `json:"path"`
	Target string `json:"target"`
}

func (l *Link) Apply(context.Context) error {
	if err := os.Symlink(l.Target, l.Path); err != nil {
		return fmt.Errorf("make link: %w", err)
	}
	return nil
}

// Revert removes the link if it still leads where ours led.
func (l *Link) Revert(context.Context) error {
	if target, _ := os.Readlink(l.Path); target != l.Target {
		return nil
	}
	if err := os.Remove(l.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove link: %w", err)
	}
	return nil
}

// Owner lends a user's file to a VMM that runs as another user. The file is looked at and changed
// by one descriptor: the owner of its directory may put another file, or a link, in its place at
// any time.
type Owner struct {
	Path   string `json:"path"`           // not a symbolic link
	File   string `json:"file,omitempty"` // as store.DriveName tells; "" in journals of older versions
	UID    int    `json:"uid"`
	GID    int    `json:"gid"`
	WasUID int    `json:"wasUid"`
	WasGID int    `json:"wasGid"`
}

// ErrReplaced says that at a drive's path is another file than the one that was leased.
var ErrReplaced = errors.New("it has been replaced by another file")

// NewOwner describes giving the file at path, called file by store.DriveName, to the user uid and
// the group of the same number, and who has it now. Returns ErrReplaced.
func NewOwner(path, file string, uid int) (*Owner, error) {
	o := &Owner{Path: path, File: file, UID: uid, GID: uid}
	f, st, err := o.open()
	if err != nil {
		return nil, fmt.Errorf("read owner: %w", err)
	}
	o.WasUID, o.WasGID = int(st.Uid), int(st.Gid)
	return o, f.Close()
}

// open opens the file, not to read it. Returns ErrReplaced.
func (o *Owner) open() (*os.File, *syscall.Stat_t, error) {
	f, fi, err := openPath(o.Path, unix.O_NOFOLLOW, o.File)
	if err != nil {
		return nil, nil, err
	}
	return f, fi.Sys().(*syscall.Stat_t), nil
}

// openPath opens what is at path, whatever that is, not to read it. Returns ErrReplaced if it is
// not called file by store.DriveName; it may be anything if file is empty.
func openPath(path string, flags int, file string) (*os.File, fs.FileInfo, error) {
	f, err := os.OpenFile(path, unix.O_PATH|flags, 0)
	if err != nil {
		return nil, nil, err
	}
	fi, err := f.Stat()
	if err == nil && file != "" && store.DriveName(fi) != file {
		err = fmt.Errorf("%s: %w", path, ErrReplaced)
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, fi, nil
}

func (o *Owner) Apply(context.Context) error {
	f, _, err := o.open()
	if err == nil {
		err = errors.Join(give(f, o.UID, o.GID), f.Close())
	}
	if err != nil {
		return fmt.Errorf("lend file: %w", err)
	}
	return nil
}

// give changes the owner of a file that is open by openPath.
func give(f *os.File, uid, gid int) error {
	return unix.Fchownat(int(f.Fd()), "", uid, gid, unix.AT_EMPTY_PATH)
}

// Revert gives the file back, if it is the same and still the VMM's.
func (o *Owner) Revert(context.Context) error {
	f, st, err := o.open()
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrReplaced) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("take file back: %w", err)
	}
	if int(st.Uid) == o.UID && int(st.Gid) == o.GID {
		err = give(f, o.WasUID, o.WasGID)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("take file back: %w", err)
	}
	return nil
}
