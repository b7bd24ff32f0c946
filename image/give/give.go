// Package give has images leave their store: as archives, and to registries.
package give

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/image/oci/pack"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/imagename"
)

// Save writes an image as an OCI archive that docker load reads too. It is what was pulled, with
// the same digest, where its layers are here or can be had again from where it came; else, and if
// it was imported, it has one layer. Kernels are not part of it. Errors are ErrNotFound of package
// image among others.
func Save(ctx context.Context, s *image.Store, ref string, w io.Writer) error {
	return leave(ctx, s, "save", ref, func(j *job) error {
		return j.parts.Archive(ctx, w, []string{j.image.Name}, func(done, total int64) { j.Progress("save", done, total) })
	})
}

// Push sends to a registry what Save would write. To is a reference; empty: the image's name.
func Push(ctx context.Context, s *image.Store, ref, to string) (pushed *pack.Pushed, err error) {
	err = leave(ctx, s, "push", ref, func(j *job) (err error) {
		pushed, err = j.parts.Push(ctx, cmp.Or(to, j.image.Name), j.image.Source, j.OCI, func(done, total int64) {
			j.Progress("push", done, total)
		})
		return err
	})
	return pushed, err
}

// job is an image that leaves.
type job struct {
	*image.Workshop
	store *image.Store
	image *image.Image
	parts *pack.Image
}

// leave finds the parts of an image, or makes them, for as long as f runs.
func leave(ctx context.Context, s *image.Store, what, ref string, f func(j *job) error) (err error) {
	i, err := s.Find(ref)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s image %s: %w", what, i.Name, err)
		}
	}()
	w, err := s.Workshop(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	j := &job{Workshop: w, store: s, image: i}
	if w.Offline && what == "push" {
		return hint.Add(image.ErrOffline, "smartvm image push, without --offline, sends it")
	}
	if what != "commit" && (i.Kernel != "" || i.Initrd != "") {
		w.Log.Warn("an image's kernel and initramfs are left out: others have no place for them", "image", i.Name)
	}
	if j.parts, err = j.whole(ctx); err != nil {
		return err
	}
	return f(j)
}

// whole are all parts: those that are kept, or that come again from where they came, or made of the
// root file system.
func (j *job) whole(ctx context.Context) (*pack.Image, error) {
	i := j.image
	if i.Digest == "" {
		return j.flat(ctx)
	}
	p, err := pack.Kept(j.Layers, i.Digest, i.ID)
	if err == nil {
		return p, nil
	}
	from := pack.Origin{Reference: i.Source, Digest: i.Digest, ID: i.ID, Dir: j.Dir}
	switch {
	case oci.Local(i.Source):
	case i.Source == image.ImportSource:
		from.Reference = "-"
	case j.Offline:
		from.Reference = "-"
	default:
		from.Reference, from.Dir = imagename.Pinned(i.Source, i.Digest), j.Layers
	}
	if from.Reference != "-" {
		j.Log.Debug("layers are not here", "image", i.Name, "err", err)
		o := j.OCI
		o.Login = nil // of where it is sent
		if p, err = from.Fetch(ctx, o, func(done, total int64) {
			j.Progress("fetch", done, total)
		}); err == nil || ctx.Err() != nil {
			return p, err
		}
	}
	j.Log.Warn("its layers are gone: the image becomes one layer, with a digest of its own", "image", i.Name, "err", err)
	return j.flat(ctx)
}

// flat makes one layer of the root file system.
func (j *job) flat(ctx context.Context) (*pack.Image, error) {
	i := j.image
	if i.Bundle != "" {
		return nil, hint.Add(errors.New("it is one of the base images, whose parts are no layers"),
			"smartvm image pull %s brings it elsewhere", i.Source)
	}
	path, kind, err := j.store.Root(ctx, i)
	if err != nil {
		return nil, err
	}
	if kind != "ext4" {
		return nil, hint.Add(fmt.Errorf("its root file system is of the type %s, which is not read here", kind),
			"import it as a directory or a tar: smartvm image import --rootfs")
	}
	d := config.Document{OS: "linux", Architecture: i.Arch, Config: i.Config, About: i.About}
	if p, err := manifest.Parse(i.About.Platform); err == nil {
		d.OS, d.Architecture, d.Variant = p.OS, p.Architecture, p.Variant
	}
	if d.About.Built.IsZero() {
		d.About.Built = i.Created
	}
	done := func(n int64) { j.Progress("make a layer", n, 0) }
	return pack.Flat(ctx, pack.Root{Path: path, Limits: j.OCI.Limits, Progress: done}, d, j.Dir)
}
