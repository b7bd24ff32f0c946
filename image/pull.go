package image

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/hint"
)

// BaseScheme begins the reference of a base image: "base:latest", "base:lts" or "base:hosted".
const BaseScheme = "base:"

// Pull fetches what a reference names, or finds that nothing has changed, and names it: see oci.Resolve for the
// forms, and BaseScheme for one more. Name is what it is called here; empty: as the reference does. What was
// fetched before an interruption is not fetched again. Errors are ErrOffline and those of packages oci
// and base.
func (s *Store) Pull(ctx context.Context, ref, name string) (*Image, error) {
	if name != "" { // before anything is fetched
		if err := ValidName(name); err != nil {
			return nil, err
		}
	}
	release, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	// One process fetches; another that wants the same waits, and then finds it here.
	sum := sha256.Sum256([]byte(ref))
	one, err := s.one(ctx, hex.EncodeToString(sum[:]), "another smartvm that pulls "+ref)
	if err != nil {
		return nil, errors.Join(err, release())
	}
	var i *Image
	if preset, ok := strings.CutPrefix(ref, BaseScheme); ok {
		i, err = s.pullBase(ctx, preset)
	} else {
		i, err = s.pullOCI(ctx, ref)
	}
	if err == nil {
		i.Name, i.Source, i.Arch = cmp.Or(name, i.Name), ref, s.opts.Arch
		if err = ValidName(i.Name); err == nil { // an archive says itself what it is called
			err = s.name(ctx, i)
		}
	}
	if err = errors.Join(err, one(), release()); err != nil {
		return nil, fmt.Errorf("pull %s: %w", ref, err)
	}
	s.log.Info("pulled", "image", i.Name, "root", i.Root)
	return i, nil
}

func (s *Store) pullOCI(ctx context.Context, ref string) (i *Image, err error) {
	if s.opts.Offline && !oci.Local(ref) {
		return nil, hint.Add(ErrOffline, "smartvm image pull %s, without --offline, brings it", ref)
	}
	o := s.opts.OCI
	o.Limits, o.Arch, o.TempDir, o.Log = s.opts.Limits, s.opts.Arch, s.path(tempDir), s.log
	img, err := oci.Resolve(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	i = &Image{Name: img.Name, Digest: img.Digest, Config: img.Config, Root: kindRoot + "-" + flatten.ID(img.Chain)}
	for _, l := range img.Layers {
		i.Layers = append(i.Layers, l.Digest)
	}
	one, err := s.one(ctx, i.Root, "another smartvm that unpacks the same layers")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, one()) }()
	if _, err := s.use(ctx, i.Root, false); err == nil {
		return i, nil
	} else if !isNotExist(err) {
		return nil, err
	}
	if err := img.Fetch(ctx, s.path(layersDir), func(done, total int64) { s.opts.Progress("fetch", done, total) }); err != nil {
		return nil, err
	}
	_, err = s.build(ctx, func(dir string) (*Object, error) {
		f, err := os.Create(filepath.Join(dir, "root.ext4"))
		if err != nil {
			return nil, err
		}
		_, err = img.Flatten(ctx, s.path(layersDir), f, func(done, total int64) { s.opts.Progress("unpack", done, total) })
		return &Object{ID: i.Root, Type: "ext4", Files: []File{{Name: "root.ext4"}}}, errors.Join(err, f.Close())
	})
	return i, err
}

// build stores what fill makes in a directory. The caller holds the store.
func (s *Store) build(ctx context.Context, fill func(dir string) (*Object, error)) (*Object, error) {
	dir, err := os.MkdirTemp(s.path(tempDir), "new-")
	if err != nil {
		return nil, fmt.Errorf("store image: %w", err)
	}
	o, err := fill(dir)
	if err == nil {
		err = s.commit(ctx, dir, o)
	}
	if errors.Is(err, unix.ENOSPC) {
		err = hint.Add(err, "free space there (smartvm image prune), or name another --data-dir")
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return o, nil
}

// pullBase makes a base image's bundle the image's. The bundle stays with the base images, whose rules of keeping it has.
func (s *Store) pullBase(ctx context.Context, preset string) (*Image, error) {
	if s.opts.Base == nil {
		return nil, fmt.Errorf("%w: there are no base images here", ErrNotFound)
	}
	b, err := s.opts.Base.Ensure(ctx, preset)
	if err != nil {
		return nil, err
	}
	return &Image{Name: BaseScheme + preset, Bundle: b.ID, BootArgs: b.BootArgs, Itself: !b.RootfsIsReadOnly}, nil
}
