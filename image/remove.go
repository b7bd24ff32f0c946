package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/lock"
)

// Removed is what Remove or Prune took away.
type Removed struct {
	Images []string `json:"images"` // names
	Bytes  int64    `json:"bytes"`  // that are free now
}

// Remove takes an image's name away, and all that no other image needs. While VMs use it, it is an
// *InUseError; with force the name goes, and what the VMs use stays for as long as they do.
func (s *Store) Remove(ctx context.Context, name string, force bool) (*Removed, error) {
	release, err := s.alone(ctx)
	if err != nil {
		return nil, err
	}
	r, err := s.remove(ctx, name, force)
	return r, errors.Join(err, release())
}

func (s *Store) remove(ctx context.Context, ref string, force bool) (*Removed, error) {
	all, bad, err := s.list()
	if err != nil {
		return nil, err
	}
	found, err := s.find(ref)
	r := &Removed{}
	if u := (*unreadableError)(nil); errors.As(err, &u) {
		// What it is nobody knows. What VMs use stays, as they say so themselves.
		if err = s.forget(u.name); err == nil {
			r.Images = append(r.Images, u.name)
		}
	}
	if err != nil {
		return nil, err
	}
	if len(found) > 1 && !force {
		return nil, hint.Add(invalid("image %s has several names: %s", ref, strings.Join(names(found), ", ")),
			"remove one of them, or all with -f")
	}
	for _, i := range found {
		by, err := s.lastUsers(i, all)
		if err != nil {
			return nil, err
		}
		if len(by) > 0 && !force {
			return nil, &InUseError{Name: i.Name, By: by}
		}
		all = slices.DeleteFunc(all, func(other *Image) bool { return other.Name == i.Name })
		if err := s.unname(ctx, i, all, len(bad) > 0); err != nil {
			return nil, err
		}
		r.Images = append(r.Images, i.Name)
	}
	r.Bytes, err = s.sweep(false, false)
	return r, err
}

func names(all []*Image) (texts []string) {
	for _, i := range all {
		texts = append(texts, i.Name)
	}
	return texts
}

// forget removes an image's description.
func (s *Store) forget(name string) error {
	if err := errors.Join(os.RemoveAll(s.nameFile(name)), atomicfile.SyncDir(s.path(namesDir))); err != nil {
		return fmt.Errorf("remove image %s: %w", name, err)
	}
	s.opts.Changed("remove", name)
	return nil
}

// lastUsers are the VMs that use what an image has, but for what another image has too.
func (s *Store) lastUsers(i *Image, all []*Image) ([]string, error) {
	shared := func(dir string) bool {
		return slices.ContainsFunc(all, func(other *Image) bool {
			return other.Name != i.Name && slices.Contains(s.dirs(other), dir)
		})
	}
	return kept.Users(true, slices.DeleteFunc(s.dirs(i), shared)...)
}

// unname takes an image's name away, and its bundle where none of the others has it, nor a VM.
// Unsure says that there are images that cannot be read: then bundles stay.
func (s *Store) unname(ctx context.Context, i *Image, others []*Image, unsure bool) error {
	if err := s.forget(i.Name); err != nil {
		return err
	}
	if i.Bundle == "" || unsure || slices.ContainsFunc(others, func(other *Image) bool {
		return other.Name != i.Name && other.Bundle == i.Bundle
	}) {
		return nil
	}
	err := s.opts.Base.Remove(ctx, i.Bundle)
	if err != nil && !isNotExist(err) && !errors.Is(err, base.ErrInUse) {
		return fmt.Errorf("remove image %s: %w", i.Name, err)
	}
	return nil
}

// PruneOptions say what is removed beside what no image needs.
type PruneOptions struct {
	All  bool              // images that no VM uses
	Only func(*Image) bool // of those; nil: all
	// the layers of all images: VMs need none, but a pull of an image that shares some fetches them
	// again
	Layers bool
}

// Prune removes what no image needs.
func (s *Store) Prune(ctx context.Context, o PruneOptions) (*Removed, error) {
	release, err := s.alone(ctx)
	if err != nil {
		return nil, err
	}
	r, err := s.prune(ctx, o)
	return r, errors.Join(err, release())
}

func (s *Store) prune(ctx context.Context, o PruneOptions) (*Removed, error) {
	r := &Removed{Images: []string{}}
	images, bad, err := s.list()
	if err != nil {
		return r, err
	}
	for _, i := range slices.Clone(images) {
		by, err := kept.Users(true, s.dirs(i)...)
		if err != nil {
			return r, err
		}
		if !o.All || len(by) > 0 || o.Only != nil && !o.Only(i) {
			continue
		}
		images = slices.DeleteFunc(images, func(other *Image) bool { return other.Name == i.Name })
		if err := s.unname(ctx, i, images, len(bad) > 0); err != nil {
			return r, err
		}
		r.Images = append(r.Images, i.Name)
	}
	r.Bytes, err = s.sweep(o.Layers, true)
	return r, err
}

// sweep removes objects that neither an image nor a VM has, and layers whose images are gone, or
// all of them, and says how many bytes that frees. Partial says that what interrupted pulls have
// fetched goes too. The caller has the store alone.
func (s *Store) sweep(allLayers, partial bool) (freed int64, err error) {
	all, bad, err := s.list()
	if err != nil {
		return 0, err
	}
	needed, unsure := s.needs(all, bad)
	if unsure {
		return 0, nil
	}
	err = s.objects.Take(s.path(objectsDir), &freed, func(name string) (bool, error) {
		by, err := kept.Users(true, s.path(objectsDir, name))
		return !needed[name] && len(by) == 0, err
	})
	if err != nil {
		return freed, fmt.Errorf("remove images: %w", err)
	}
	dir, err := os.Open(s.path(layersDir))
	if err != nil {
		return freed, fmt.Errorf("remove layers: %w", err)
	}
	defer dir.Close()
	if err = lock.Try(dir, lock.Exclusive); errors.Is(err, lock.ErrHeld) {
		return freed, nil // a pull that is under way may want them
	}
	if err == nil {
		err = s.objects.Take(s.path(layersDir), &freed, func(name string) (bool, error) {
			return allLayers || !needed[name] && (partial || !strings.HasSuffix(name, download.PartialSuffix)), nil
		})
	}
	if err != nil {
		return freed, fmt.Errorf("remove layers: %w", err)
	}
	return freed, nil
}

// Usage is what a store takes of its disk, in bytes.
type Usage struct {
	Images  int   `json:"images"`
	Objects int64 `json:"objects"`
	Layers  int64 `json:"layers"`
	Unused  int64 `json:"unused"` // of those, what Prune would free without all
}

// Usage measures the store.
func (s *Store) Usage(ctx context.Context) (*Usage, error) {
	release, err := s.Hold(ctx)
	if err != nil {
		return nil, err
	}
	u, err := s.usage()
	return u, errors.Join(err, release())
}

func (s *Store) usage() (*Usage, error) {
	images, bad, err := s.list()
	if err != nil {
		return nil, err
	}
	needed, _ := s.needs(images, bad)
	u := &Usage{Images: len(images) + len(bad)}
	for _, part := range []struct {
		dir string
		sum *int64
	}{{objectsDir, &u.Objects}, {layersDir, &u.Layers}} {
		entries, err := os.ReadDir(s.path(part.dir))
		if err != nil {
			return nil, fmt.Errorf("measure images: %w", err)
		}
		for _, e := range entries {
			size, err := kept.Usage(s.path(part.dir, e.Name()))
			if err != nil {
				return nil, fmt.Errorf("measure images: %w", err)
			}
			*part.sum += size
			if !needed[e.Name()] && !InUse(s.path(part.dir, e.Name())) {
				u.Unused += size
			}
		}
	}
	return u, nil
}
