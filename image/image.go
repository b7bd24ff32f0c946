package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/internal/kept"
)

// Image is a name and what it stands for. Its JSON form is stable, and what is kept on disk.
type Image struct {
	Version int       `json:"version"`
	Name    string    `json:"name"`
	Created time.Time `json:"created"` // when it came here
	Source  string    `json:"source"`  // where from: a reference, or "import"
	// ID is what it is, under whatever name, in 64 hexadecimal digits: of what a registry or an
	// archive has, the configuration's SHA-256, as with docker. Digest is the manifest's, and Index
	// that of the index that has it, if it was pulled by one.
	ID     string `json:"id,omitempty"`
	Digest string `json:"digest,omitempty"`
	Index  string `json:"index,omitempty"`
	Arch   string `json:"arch"`
	// Root, Kernel, Modules (the kernel's, all of them) and Initrd are ids of objects. An image
	// without a kernel boots with another's, or the host's.
	Root    string `json:"root,omitempty"`
	Kernel  string `json:"kernel,omitempty"`
	Modules string `json:"modules,omitempty"`
	Initrd  string `json:"initrd,omitempty"`
	// Bundle is a base image's, in place of objects.
	Bundle string `json:"bundle,omitempty"`
	// Itself says that the image boots without our initramfs: its kernel finds its root.
	Itself   bool         `json:"itself,omitempty"`
	BootArgs string       `json:"bootArgs,omitempty"` // kernel command line; empty: the default
	Config   oci.Config   `json:"config,omitzero"`    // what it runs, if it says so
	About    config.About `json:"about,omitzero"`
	Layers   []string     `json:"layers,omitempty"` // digests of the compressed layers that are kept for other images
	// Stamp is what was looked at when a kernel was taken from the host: it is taken again when that
	// changes.
	Stamp string `json:"stamp,omitempty"`
	// Replaced is another image that had the name until now. It is not stored.
	Replaced *Image `json:"-"`
}

// ImportSource is the Source of what was imported, or made of a VM.
const ImportSource = "import"

const (
	imageVersion = 1
	maxImage     = 8 << 20 // bytes of its description: more than configurations may have
)

// objects are the ids of those that an image has.
func (i *Image) objects() []string {
	return slices.DeleteFunc([]string{i.Root, i.Kernel, i.Modules, i.Initrd}, func(id string) bool { return id == "" })
}

// dirs are the directories in which VMs say that they use an image.
func (s *Store) dirs(i *Image) []string {
	var all []string
	for _, id := range i.objects() {
		all = append(all, s.objects.Dir(id))
	}
	if i.Bundle != "" && s.opts.Base != nil {
		all = append(all, s.opts.Base.Dir(i.Bundle))
	}
	return all
}

// Inspection is an image with its objects.
type Inspection struct {
	Image
	Size    int64    `json:"size"` // bytes of its objects on disk, shared or not
	Objects []Object `json:"objects"`
	Missing []string `json:"missing,omitempty"` // objects, or the bundle, that are not here or cannot be read
	UsedBy  []string `json:"usedBy,omitempty"`  // directories of VMs
}

// Inspect tells all about an image. Returns what Find does.
func (s *Store) Inspect(ref string) (*Inspection, error) {
	i, err := s.Find(ref)
	if err != nil {
		return nil, err
	}
	in := &Inspection{Image: *i, Missing: s.missing(i), Objects: []Object{}}
	for _, id := range i.objects() {
		if o, err := s.objects.Get(id); err == nil {
			in.Objects = append(in.Objects, asObject(o))
		}
	}
	for _, dir := range s.dirs(i) {
		size, err := kept.Usage(dir)
		if err != nil && !isNotExist(err) {
			return nil, fmt.Errorf("image %s: %w", i.Name, err)
		}
		in.Size += size
	}
	in.UsedBy, err = kept.Users(false, s.dirs(i)...)
	return in, err
}

// missing are the parts of an image that are not here.
func (s *Store) missing(i *Image) (all []string) {
	for _, id := range i.objects() {
		if _, err := s.objects.Get(id); err != nil {
			all = append(all, id)
		}
	}
	if i.Bundle != "" && s.opts.Base != nil {
		if _, err := os.Lstat(s.opts.Base.Dir(i.Bundle)); err != nil {
			all = append(all, i.Bundle)
		}
	}
	return all
}

// Restore pulls an image again if parts of it are not here and there is where to get them from: a
// bundle may have made room for others.
func (s *Store) Restore(ctx context.Context, i *Image) (*Image, error) {
	if len(s.missing(i)) == 0 || i.Source == ImportSource || oci.Local(i.Source) {
		return i, nil
	}
	return s.Pull(ctx, i.Source, i.Name)
}

// Verify reads all of an image and compares it with what was stored. Returns ErrCorrupt,
// ErrNotFound.
func (s *Store) Verify(ctx context.Context, name string) error {
	release, err := s.Hold(ctx)
	if err != nil {
		return err
	}
	i, err := s.Find(name)
	if err == nil {
		for _, id := range i.objects() {
			if _, useErr := s.objects.Use(ctx, id, true); useErr != nil {
				err = errors.Join(err, fmt.Errorf("image %s: %w", i.Name, useErr))
			}
		}
		if i.Bundle != "" {
			err = errors.Join(err, s.opts.Base.Verify(ctx, i.Bundle))
		}
	}
	return errors.Join(err, release())
}
