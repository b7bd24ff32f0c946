package events

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/status"
)

// Follow yields the events after the one with an id, and then those that come, until ctx ends,
// which is its last error. An id of 0 is before all that are kept, Now before those that come.
// Where events were dropped before they were read, it yields a *status.LostError and goes on.
func (r *Ring) Follow(ctx context.Context, since int64) iter.Seq2[status.Event, error] {
	return func(yield func(status.Event, error) bool) {
		f := &follower{ring: r, since: since, yield: yield}
		err := f.run(ctx)
		f.close()
		if err != nil && !errors.Is(err, errEnough) {
			yield(status.Event{}, err)
		}
	}
}

// Now stands for the id of the newest event.
const Now = -1

// errEnough says that no more events are wanted.
var errEnough = errors.New("enough")

// follower reads a ring.
type follower struct {
	ring  *Ring
	since int64 // id of the last event that was read, or that is not wanted
	files []*reader
	yield func(status.Event, error) bool
}

func (f *follower) run(ctx context.Context) error {
	if err := os.Mkdir(f.ring.Dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	changes, err := watch(ctx, f.ring.Dir) // before the first look
	if err != nil {
		return err
	}
	defer changes.Close()
	for {
		err := f.pass()
		if err == nil {
			err = changes.wait()
		}
		if err != nil && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
	}
}

// pass reads all that there is.
func (f *follower) pass() error {
	for {
		if len(f.files) == 0 {
			if err := f.open(); err != nil || len(f.files) == 0 {
				return err
			}
		}
		if err := f.drain(f.files[0]); err != nil {
			return err
		}
		last := len(f.files) == 1
		if last && lock.StillAt(f.files[0].f, filepath.Join(f.ring.Dir, current)) {
			return nil
		}
		if last { // what was written before it was renamed
			if err := f.drain(f.files[0]); err != nil {
				return err
			}
		}
		if err := f.files[0].f.Close(); err != nil {
			return err
		}
		f.files = f.files[1:]
	}
}

// open opens the files in which events after since are, the older one first.
func (f *follower) open() error {
	for _, name := range []string{older, current} { // in the order in which they are renamed, so that none is missed
		r, err := openReader(filepath.Join(f.ring.Dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		f.files = append(f.files, r)
	}
	if f.since == Now {
		f.since = 0
		if n := len(f.files); n > 0 {
			newest := f.files[n-1].f
			fi, err := newest.Stat()
			if err != nil {
				return err
			}
			f.since, _, err = tail(newest, fi.Size())
			return err
		}
		return nil
	}
	if len(f.files) > 0 && f.since > 0 && f.files[0].after > f.since {
		lost := &status.LostError{Since: f.since, Through: f.files[0].after}
		f.since = f.files[0].after
		if !f.yield(status.Event{}, lost) {
			return errEnough
		}
	}
	return nil
}

// drain reads what there is of a file.
func (f *follower) drain(r *reader) error {
	for {
		e, err := r.next()
		if e == nil || err != nil {
			return err
		}
		if e.ID <= f.since {
			continue
		}
		f.since = e.ID
		if !f.yield(*e, nil) {
			return errEnough
		}
	}
}

func (f *follower) close() {
	for _, r := range f.files {
		_ = r.f.Close()
	}
}

// changes tells of changes in a directory.
type changes struct {
	*os.File
	stop func() bool
}

// watch watches a directory until ctx ends.
func watch(ctx context.Context, dir string) (*changes, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	c := &changes{File: os.NewFile(uintptr(fd), "inotify")}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MODIFY|unix.IN_MOVED_TO|unix.IN_DELETE_SELF); err != nil {
		return nil, errors.Join(&fs.PathError{Op: "watch", Path: dir, Err: err}, c.File.Close())
	}
	c.stop = context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	return c, nil
}

// wait returns when there was a change since it returned last.
func (c *changes) wait() error {
	_, err := c.Read(make([]byte, 4<<10))
	return err
}

func (c *changes) Close() error {
	c.stop()
	return c.File.Close()
}
