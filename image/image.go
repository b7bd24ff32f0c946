package image

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"push.rocks/smartvm/image/oci"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/kept"
)

// Image is a name and what it stands for. Its JSON form is stable, and what is kept on disk.
type Image struct {
	Version int       `json:"version"`
	Name    string    `json:"name"`
	Created time.Time `json:"created"` // when it came here
	Source  string    `json:"source"`  // where from: a reference, or "import"
	Digest  string    `json:"digest,omitempty"`
	Arch    string    `json:"arch"`
	// Root, Kernel and Initrd are ids of objects. An image without a kernel boots with another's, or the host's.
	Root   string `json:"root,omitempty"`
	Kernel string `json:"kernel,omitempty"`
	Initrd string `json:"initrd,omitempty"`
	// Bundle is a base image's, in place of objects.
	Bundle string `json:"bundle,omitempty"`
	// Itself says that the image boots without our initramfs: its kernel finds its root.
	Itself   bool       `json:"itself,omitempty"`
	BootArgs string     `json:"bootArgs,omitempty"` // kernel command line; empty: the default
	Config   oci.Config `json:"config,omitzero"`    // what it runs, if it says so
	Layers   []string   `json:"layers,omitempty"`   // digests of the compressed layers that are kept for other images
	// Stamp is what was looked at when a kernel was taken from the host: it is taken again when that changes.
	Stamp string `json:"stamp,omitempty"`
}

const (
	imageVersion = 1
	maxImage     = 1 << 20 // bytes of its description
	maxName      = 255     // bytes
)

// objects are the ids of those that an image has.
func (i *Image) objects() []string {
	return slices.DeleteFunc([]string{i.Root, i.Kernel, i.Initrd}, func(id string) bool { return id == "" })
}

// dirs are the directories in which VMs say that they use an image.
func (s *Store) dirs(i *Image) []string {
	var all []string
	for _, id := range i.objects() {
		all = append(all, s.objectDir(id))
	}
	if i.Bundle != "" && s.opts.Base != nil {
		all = append(all, s.opts.Base.Dir(i.Bundle))
	}
	return all
}

// namePattern is what people may call an image: it looks like a reference without being a path or one of the schemes.
var namePattern = regexp.MustCompile(`^[a-z0-9][A-Za-z0-9._/:@-]*$`)

// ValidName says whether an image can be imported under a name.
func ValidName(name string) error {
	if !namePattern.MatchString(name) || len(name) > maxName || strings.Contains(name, "..") || strings.Contains(name, "//") {
		return invalid("image name %q: want letters, digits and ._-/:@, beginning with a small letter or digit", name)
	}
	return nil
}

// invalidError is what a caller got wrong. It is fs.ErrInvalid.
type invalidError struct{ error }

func (e invalidError) Is(target error) bool { return target == fs.ErrInvalid }

func invalid(format string, args ...any) error { return invalidError{fmt.Errorf(format, args...)} }

// nameFile is where an image of a name is described. Any name gives a file name, and different ones different files.
func (s *Store) nameFile(name string) string {
	return s.path(namesDir, base64.RawURLEncoding.EncodeToString([]byte(name))+".json")
}

// Find returns the image of a name, with ":latest" added if there is none without. Returns ErrNotFound.
func (s *Store) Find(name string) (*Image, error) {
	if name == "" || len(name) > maxName {
		return nil, fmt.Errorf("image %.40q: %w", name, ErrNotFound)
	}
	for _, name := range []string{name, name + ":latest"} {
		i, err := readJSON[Image](s.nameFile(name), maxImage)
		if isNotExist(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", name, err)
		}
		if i.Version != imageVersion || i.Name != name {
			return nil, fmt.Errorf("image %s: its description has version %d and name %q: %w", name, i.Version, i.Name, ErrCorrupt)
		}
		return &i, nil
	}
	return nil, fmt.Errorf("image %s: %w", name, ErrNotFound)
}

// List returns all images, by name. What cannot be read is left out, and in the error.
func (s *Store) List() ([]*Image, error) {
	entries, err := os.ReadDir(s.path(namesDir))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var all []*Image
	var errs []error
	for _, e := range entries {
		encoded, ok := strings.CutSuffix(e.Name(), ".json")
		name, err := base64.RawURLEncoding.DecodeString(encoded)
		if !ok || err != nil {
			continue // an unfinished one
		}
		i, err := s.Find(string(name))
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, i)
	}
	slices.SortFunc(all, func(a, b *Image) int { return strings.Compare(a.Name, b.Name) })
	return all, errors.Join(errs...)
}

// name gives i its name, in place of what had it. The caller holds the store.
func (s *Store) name(ctx context.Context, i *Image) error {
	i.Version, i.Created = imageVersion, time.Now().UTC().Truncate(time.Second)
	path := s.nameFile(i.Name)
	release, err := s.locks.One(ctx, oneName, i.Name, "another smartvm that makes the same image")
	if err != nil {
		return err
	}
	return errors.Join(atomicfile.WriteJSON(path, i), release())
}

// Inspection is an image with its objects.
type Inspection struct {
	Image
	Size    int64    `json:"size"` // bytes of its objects on disk, shared or not
	Objects []Object `json:"objects"`
	UsedBy  []string `json:"usedBy,omitempty"` // directories of VMs
}

// Inspect tells all about an image. Returns ErrNotFound.
func (s *Store) Inspect(name string) (*Inspection, error) {
	i, err := s.Find(name)
	if err != nil {
		return nil, err
	}
	in := &Inspection{Image: *i}
	for _, id := range i.objects() {
		o, err := s.object(id)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", i.Name, err)
		}
		in.Objects = append(in.Objects, *o)
	}
	for _, dir := range s.dirs(i) {
		size, err := kept.Usage(dir)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", i.Name, err)
		}
		in.Size += size
	}
	in.UsedBy, err = kept.Users(false, s.dirs(i)...)
	return in, err
}

// Verify reads all of an image and compares it with what was stored. Returns ErrCorrupt, ErrNotFound.
func (s *Store) Verify(ctx context.Context, name string) error {
	release, err := s.Hold(ctx)
	if err != nil {
		return err
	}
	i, err := s.Find(name)
	if err == nil {
		for _, id := range i.objects() {
			if _, useErr := s.use(ctx, id, true); useErr != nil {
				err = errors.Join(err, fmt.Errorf("image %s: %w", i.Name, useErr))
			}
		}
		if i.Bundle != "" {
			err = errors.Join(err, s.opts.Base.Verify(ctx, i.Bundle))
		}
	}
	return errors.Join(err, release())
}
