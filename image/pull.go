package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/pack"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/imagename"
	"push.rocks/smartvm/internal/lock"
)

// BaseScheme begins the reference of a base image: "base:latest", "base:lts" or "base:hosted".
const BaseScheme = "base:"

// Pull fetches what a reference names, or finds that nothing has changed, and names it: see
// oci.Resolve for the forms, and BaseScheme for one more. Name is what it is called here; empty: as
// the reference does. What was fetched before an interruption is not fetched again. Errors are
// ErrOffline and those of packages oci and base.
func (s *Store) Pull(ctx context.Context, ref, name string) (*Image, error) {
	if name != "" { // before anything is fetched
		if err := OwnName(name); err != nil {
			return nil, err
		}
		name = imagename.Familiar(name)
	}
	if err := s.locks.Begin(); err != nil {
		return nil, err
	}
	// One process fetches; another that wants the same waits, and then finds it here.
	one, err := s.locks.One(ctx, onePull, ref, "another smartvm that pulls "+ref)
	if err != nil {
		return nil, err
	}
	var i *Image
	if preset, ok := strings.CutPrefix(ref, BaseScheme); ok {
		i, err = s.pullBase(ctx, preset, name)
	} else {
		i, err = s.pullOCI(ctx, ref, name, nil)
	}
	if err = errors.Join(err, one()); err != nil {
		return nil, fmt.Errorf("pull %s: %w", ref, err)
	}
	s.log.Info("pulled", "image", i.Name, "root", i.Root)
	return i, nil
}

// Keep takes an image that was made here, in a workshop that is open, from a layout whose layers
// are in the directory of those that are kept too. They stay as long as it does. It boots as the
// image does that it was made from. Name is one of OwnName.
func (s *Store) Keep(ctx context.Context, layout, name string, from *Image) (*Image, error) {
	return s.pullOCI(ctx, "oci:"+layout, imagename.Familiar(name), from)
}

// pullOCI holds the store only while it looks whether the image is here, and when it stores it:
// until then what it makes is in a directory of its own, and the layers are kept by a lock on
// theirs.
func (s *Store) pullOCI(ctx context.Context, ref, name string, from *Image) (i *Image, err error) {
	if s.opts.Offline && !oci.Local(ref) {
		return nil, hint.Add(ErrOffline, "smartvm image pull %s, without --offline, brings it", ref)
	}
	w, err := s.locks.Work()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	o := s.sources(w.Dir)
	was := s.pulled(ref, name)
	o.Unless = cmp.Or(was.Index, was.Digest)
	img, err := oci.Resolve(ctx, ref, o)
	if errors.Is(err, oci.ErrUnchanged) {
		if here, err := s.again(ctx, was); here || err != nil {
			return was, err
		}
		o.Unless = ""
		img, err = oci.Resolve(ctx, ref, o)
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	i = &Image{
		Name: cmp.Or(name, img.Name), Source: ref, Arch: s.opts.Arch, ID: img.ID, Digest: img.Digest, Index: img.Index,
		Config: img.Config, About: img.About, Root: chainID(img.Chain),
	}
	if from != nil {
		i.Source, i.Kernel, i.Modules, i.Initrd, i.BootArgs = ImportSource, from.Kernel, from.Modules,
			from.Initrd, from.BootArgs
	}
	// An archive says itself what it is called.
	if err := ValidName(i.Name); err != nil {
		return nil, err
	}
	if _, digest, pinned := imagename.CutDigest(i.Name); pinned && !i.has(digest) {
		return nil, hint.Add(invalid("image name %s: it is another's digest", i.Name), "call it otherwise: --name")
	}
	one, err := s.locks.One(ctx, oneMake, i.Root, "another smartvm that unpacks the same layers")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, one()) }()
	layers := s.path(layersDir)
	if from != nil || !oci.Local(ref) { // what is here is read there
		for _, l := range img.Layers {
			i.Layers = append(i.Layers, l.Digest)
		}
		var keep func() error
		if keep, err = s.locks.Lock(ctx, layers, lock.Shared, "another smartvm to finish removing images"); err != nil {
			return nil, fmt.Errorf("store layers: %w", err)
		}
		defer func() { err = errors.Join(err, keep()) }()
		if err := pack.Keep(layers, img.Documents[:]...); err != nil {
			return nil, err
		}
	}
	if here, err := s.again(ctx, i); here || err != nil {
		return i, err
	}
	root, err := s.objects.Draft(ctx, func(dir string) (*object, error) {
		f, err := os.Create(filepath.Join(dir, "root.ext4"))
		if err != nil {
			return nil, err
		}
		_, err = img.Flatten(ctx, layers, f, s.opts.Progress)
		return &object{ID: i.Root, Type: "ext4", Files: []file{{Name: "root.ext4"}}}, errors.Join(err, f.Close())
	})
	if err != nil {
		return nil, err
	}
	return i, errors.Join(s.publish(ctx, i, root), root.Close())
}

// pulled is what a pull of a reference has made here before, as one would make it now; the zero
// value if that is nothing.
func (s *Store) pulled(ref, name string) *Image {
	i, err := s.Find(cmp.Or(name, strings.TrimPrefix(ref, "docker://")))
	if err != nil || i.Source != ref || name != "" && i.Name != name || i.Arch != s.opts.Arch ||
		!strings.HasPrefix(i.Root, chainID("")) || oci.Local(ref) {
		return &Image{}
	}
	return i
}

// again names an image whose root is here already, and whole.
func (s *Store) again(ctx context.Context, i *Image) (here bool, err error) {
	release, err := s.Hold(ctx)
	if err != nil {
		return false, err
	}
	_, err = s.objects.Use(ctx, i.Root, false)
	switch {
	case err == nil:
		here, err = true, s.name(ctx, i)
	case isNotExist(err):
		err = nil
	case errors.Is(err, ErrCorrupt):
		s.log.Warn("image is damaged: making it anew", "image", i.Name, "err", err)
		err = nil
	}
	return here, errors.Join(err, release())
}

// pullBase makes a base image's bundle the image's. The bundle stays with the base images, whose
// rules of keeping it has.
func (s *Store) pullBase(ctx context.Context, preset, name string) (*Image, error) {
	if s.opts.Base == nil {
		return nil, fmt.Errorf("%w: there are no base images here", ErrNotFound)
	}
	b, err := s.opts.Base.Ensure(ctx, preset)
	if err != nil {
		return nil, err
	}
	i := &Image{
		Name: cmp.Or(name, BaseScheme+preset), Source: BaseScheme + preset, Arch: s.opts.Arch, Bundle: b.ID,
		BootArgs: b.BootArgs,
		Itself:   !b.RootfsIsReadOnly,
	}
	return i, s.publish(ctx, i)
}
