package share

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/spec"
)

// Image is the file with the copies, an effect.
type Image struct {
	Path    string        `json:"path"` // in a directory of ours
	Volumes []spec.Volume `json:"volumes"`
	// Limits bound all of them together.
	Limits flatten.Limits `json:"limits,omitzero"`
	// Named are mounted in the guest too, maybe in one of Volumes.
	Named []spec.NamedVolume `json:"named,omitempty"`
	// Copied is the file in which it is noted what was copied, for Merge. It outlives the image, in a
	// directory of ours. "": it is not noted.
	Copied string `json:"copied,omitempty"`
	// Log is told what is left out. If nil, nothing is.
	Log *slog.Logger `json:"-"`
}

// Apply makes it. It is refused before it would fill its file system. What cannot be copied is left
// out.
func (i *Image) Apply(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("copy volume: %w", err)
		}
	}()
	c, err := i.open(ctx)
	defer c.close()
	if err != nil {
		return err
	}
	if err := i.space(c); err != nil {
		return err
	}
	if i.Copied != "" {
		if c.stamps, err = newStampWriter(i.Copied); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.stamps.close()) }()
	}
	// A VMM in a jail is another user; others do not come as far as here.
	f, err := os.OpenFile(i.Path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	in, out := io.Pipe()
	walked := make(chan error, 1)
	go func() {
		err := c.write(out)
		out.CloseWithError(err)
		walked <- err
	}()
	err = flatten.TarToExt4(ctx, in, f, i.Limits)
	in.CloseWithError(errStopped)
	if why := <-walked; why != nil && !errors.Is(why, errStopped) {
		err = why // which is all that the reader knows
	}
	if err != nil {
		v := i.Volumes[c.at]
		err = fmt.Errorf("-v %s:%s: %w", v.Source, v.Target, err)
	}
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	i.warn(c)
	return nil
}

// warn tells what is left out.
func (i *Image) warn(c *copier) {
	for _, t := range c.trees {
		t.out.warn(i.Log, &i.Volumes[t.n])
	}
}

func (i *Image) open(ctx context.Context) (*copier, error) {
	c := &copier{ctx: ctx}
	for n, v := range i.Volumes {
		t, err := openTree(n, v, i.inside(n))
		if err != nil {
			return c, err
		}
		c.trees = append(c.trees, t)
	}
	return c, nil
}

var errStopped = errors.New("no process reads any more")

// inside are the places of other volumes in the n-th.
func (i *Image) inside(n int) (dirs []string) {
	for _, v := range i.Volumes {
		rel, ok := strings.CutPrefix(v.Target, i.Volumes[n].Target+"/")
		if !ok {
			continue
		}
		if fi, err := os.Stat(v.Source); err == nil && !fi.IsDir() {
			rel = filepath.Dir(rel) // the guest makes the file
		}
		if rel != "." {
			dirs = append(dirs, rel)
		}
	}
	for _, v := range i.Named {
		if rel, ok := strings.CutPrefix(v.Target, i.Volumes[n].Target+"/"); ok {
			dirs = append(dirs, rel)
		}
	}
	return dirs
}

// space says whether there is room for what is in trees. That more comes meanwhile shows when it
// does not fit.
func (i *Image) space(c *copier) error {
	need, err := c.size()
	if err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(i.Path), &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; need > free {
		return &stage.SpaceError{Source: c.trees[0].root.Name(), Dir: filepath.Dir(i.Path), Need: need, Free: free}
	}
	return nil
}

// Revert removes the image.
func (i *Image) Revert(context.Context) error {
	if err := os.Remove(i.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove copies of volumes: %w", err)
	}
	return nil
}
