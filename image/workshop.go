package image

import (
	"context"
	"errors"
	"log/slog"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/internal/storelock"
)

// Workshop is where other packages make parts of images. While it is open, no layer is removed.
type Workshop struct {
	Dir      string // what is made; its content goes with the workshop
	Layers   string // the directory of the layers and documents that are kept, by digest
	OCI      oci.Options
	Offline  bool
	Log      *slog.Logger
	Progress func(step string, done, total int64)

	work   *storelock.Work
	unlock func() error
}

// Workshop opens one. The caller closes it.
func (s *Store) Workshop(ctx context.Context) (*Workshop, error) {
	if err := s.locks.Begin(); err != nil {
		return nil, err
	}
	work, err := s.locks.Work()
	if err != nil {
		return nil, err
	}
	w := &Workshop{
		Dir: work.Dir, Layers: s.path(layersDir), OCI: s.sources(work.Dir), Offline: s.opts.Offline, Log: s.log,
		Progress: s.opts.Progress, work: work,
	}
	if w.unlock, err = s.locks.Lock(ctx, w.Layers, lock.Shared, "another smartvm to finish removing images"); err != nil {
		return nil, errors.Join(err, work.Close())
	}
	return w, nil
}

// sources says where images come from, for somebody who has a directory to work in.
func (s *Store) sources(temp string) oci.Options {
	o := s.opts.OCI
	o.Limits, o.Arch, o.TempDir, o.Log = s.opts.Limits, s.opts.Arch, temp, s.log
	return o
}

// Close removes what is in Dir.
func (w *Workshop) Close() error { return errors.Join(w.unlock(), w.work.Close()) }

// Root checks an image's root file system, and returns where it is and of what type. Returns
// ErrCorrupt.
func (s *Store) Root(ctx context.Context, i *Image) (path, kind string, err error) {
	if i.Root == "" {
		return "", "", errors.New("it has no root file system")
	}
	o, err := s.objects.Use(ctx, i.Root, false)
	if err != nil {
		return "", "", err
	}
	return s.objects.File(o), o.Type, nil
}
