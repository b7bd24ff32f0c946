package stage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
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

// Owner lends a user's file to a VMM that runs as another user.
type Owner struct {
	Path   string `json:"path"` // not a symbolic link
	UID    int    `json:"uid"`
	GID    int    `json:"gid"`
	WasUID int    `json:"wasUid"`
	WasGID int    `json:"wasGid"`
}

// NewOwner describes giving path to uid:gid, and who has it now.
func NewOwner(path string, uid, gid int) (*Owner, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("read owner: %w", err)
	}
	st := fi.Sys().(*syscall.Stat_t)
	return &Owner{Path: path, UID: uid, GID: gid, WasUID: int(st.Uid), WasGID: int(st.Gid)}, nil
}

func (o *Owner) Apply(context.Context) error {
	if err := os.Lchown(o.Path, o.UID, o.GID); err != nil {
		return fmt.Errorf("lend file: %w", err)
	}
	return nil
}

// Revert gives the file back, if it is still the VMM's.
func (o *Owner) Revert(context.Context) error {
	fi, err := os.Lstat(o.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("take file back: %w", err)
	}
	if st := fi.Sys().(*syscall.Stat_t); int(st.Uid) != o.UID || int(st.Gid) != o.GID {
		return nil
	}
	if err := os.Lchown(o.Path, o.WasUID, o.WasGID); err != nil {
		return fmt.Errorf("take file back: %w", err)
	}
	return nil
}
