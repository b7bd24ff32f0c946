package give

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/internal/layers"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/image/oci/pack"
)

// CommitOptions say what becomes of what a VM has written. Image, Root, Name and Read are required.
type CommitOptions struct {
	Image string // that the VM runs, as it calls it; it may have another name meanwhile
	Root  string // path of its root file system
	Name  string // of the new one
	// Read gives read the path of the VM's ext4 over the image, which nobody changes meanwhile.
	Read    func(ctx context.Context, read func(path string) error) error
	Change  config.Change
	Author  string
	Comment string
}

// own are files that a VM has of its own, as it is told who it is.
var own = []string{"lost+found", "etc/hostname", "etc/hosts", "etc/machine-id", "etc/resolv.conf"}

// Commit makes an image of one and what a VM of it has written, which becomes its uppermost layer.
// Files that say who a VM is stay as they are in the image. Errors are those of Save,
// fs.ErrInvalid, ext4.ErrFormat and ext4.ErrLayer.
func Commit(ctx context.Context, s *image.Store, o CommitOptions) (made *image.Image, err error) {
	if err := image.OwnName(o.Name); err != nil {
		return nil, err
	}
	ref, err := named(s, o.Image, o.Root)
	if err != nil {
		return nil, err
	}
	err = leave(ctx, s, "commit", ref, func(j *job) error {
		d, err := config.Parse(j.parts.Config)
		if err != nil {
			return err
		}
		if d.Config, err = o.Change.Apply(d.Config); err != nil { // before the VM stands still
			return fmt.Errorf("%w: %w", fs.ErrInvalid, err)
		}
		var layer pack.Layer
		var diffID string
		err = o.Read(ctx, func(path string) (err error) {
			scratch := pack.Root{
				Path: path, Upper: guest.UpperDir, Leave: func(name string) bool { return slices.Contains(own, name) },
				Limits: j.OCI.Limits, Progress: func(n int64) { j.Progress("commit", n, 0) },
			}
			if layer, diffID, err = scratch.Layer(ctx, j.Dir); err != nil {
				err = fmt.Errorf("disk of the VM: %w", err)
			}
			return err
		})
		if err != nil {
			return err
		}
		d.DiffIDs = append(slices.Clone(d.DiffIDs), diffID)
		p, err := with(j.parts, d, o, layer)
		if err != nil {
			return err
		}
		for _, l := range p.Layers {
			if err := os.Link(l.Path, layers.Path(j.Layers, l.Digest)); err != nil && !errors.Is(err, os.ErrExist) {
				return fmt.Errorf("keep layer: %w", err)
			}
		}
		layout := filepath.Join(j.Dir, "layout")
		if err := p.Layout(layout); err != nil {
			return err
		}
		made, err = s.Keep(ctx, layout, o.Name, j.image)
		return err
	})
	return made, err
}

// named is how an image is called that has a root file system: as before, if that is still so.
func named(s *image.Store, name, root string) (string, error) {
	id := filepath.Base(filepath.Dir(root))
	if i, err := s.Find(name); err == nil && i.Root == id {
		return name, nil
	}
	all, err := s.List()
	for _, i := range all {
		if i.Root == id {
			return i.Name, nil
		}
	}
	return "", errors.Join(err, fmt.Errorf("image %s: %w: what the VM runs has no name any more", name, image.ErrNotFound))
}

// with is an image with one more layer, and what d says of it.
func with(below *pack.Image, d *config.Document, o CommitOptions, layer pack.Layer) (*pack.Image, error) {
	d.About.Built = time.Now().UTC().Truncate(time.Second)
	if o.Author != "" {
		d.About.Author = o.Author
	}
	d.About.History = append(slices.Clone(d.About.History),
		config.Step{Created: d.About.Built, CreatedBy: "smartvm commit", Comment: o.Comment})
	text, err := d.Text()
	if err != nil {
		return nil, err
	}
	return pack.New(text, append(slices.Clone(below.Layers), layer))
}
