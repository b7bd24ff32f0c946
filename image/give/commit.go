package give

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/image/oci/layers"
	"push.rocks/smartvm/image/oci/pack"
	"push.rocks/smartvm/internal/ext4"
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

// upper is the directory of a scratch that has what was written.
const upper = "upper"

// own are files that a VM has of its own, as it is told who it is.
var own = []string{"lost+found", "etc/hostname", "etc/hosts", "etc/machine-id", "etc/resolv.conf"}

// Commit makes an image of one and what a VM of it has written, which becomes its uppermost layer. Files that say who a VM is
// stay as they are in the image. Errors are those of Save, ext4.ErrFormat and ext4.ErrLayer.
func Commit(ctx context.Context, s *image.Store, o CommitOptions) (made *image.Image, err error) {
	ref, err := named(s, o.Image, o.Root)
	if err != nil {
		return nil, err
	}
	err = leave(ctx, s, "commit", ref, func(j *job) error {
		var layer pack.Layer
		var diffID string
		err := o.Read(ctx, func(path string) (err error) {
			layer, diffID, err = j.layer(ctx, path)
			return err
		})
		if err != nil {
			return err
		}
		p, err := with(j.parts, o, layer, diffID)
		if err != nil {
			return err
		}
		for i, l := range p.Layers {
			to := layers.Path(j.Layers, l.Digest)
			if _, err := os.Lstat(to); err == nil {
				continue
			}
			if err := os.Link(l.Path, to); err != nil && !errors.Is(err, os.ErrExist) {
				return fmt.Errorf("keep layer: %w", err)
			}
			p.Layers[i].Path = to
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

// layer makes a layer of what a VM has written.
func (j *job) layer(ctx context.Context, scratch string) (l pack.Layer, diffID string, err error) {
	f, err := os.Open(scratch)
	if err != nil {
		return l, "", err
	}
	defer f.Close()
	fs, err := ext4.Open(f)
	if err != nil {
		return l, "", fmt.Errorf("disk of the VM: %w", err)
	}
	limits := j.OCI.Limits.OrDefaults()
	return pack.Write(j.Dir, func(n int64) { j.Progress("commit", n, 0) }, func(w *tar.Writer) error {
		return fs.Layer(ctx, w, upper, func(name string) bool { return slices.Contains(own, name) }, ext4.Limits{Bytes: limits.MaxBytes, Entries: limits.MaxEntries})
	})
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

// with is an image with one more layer.
func with(below *pack.Image, o CommitOptions, layer pack.Layer, diffID string) (*pack.Image, error) {
	d, err := config.Parse(below.Config)
	if err != nil {
		return nil, err
	}
	if d.Config, err = o.Change.Apply(d.Config); err != nil {
		return nil, err
	}
	d.DiffIDs = append(slices.Clone(d.DiffIDs), diffID)
	d.About.Built = time.Now().UTC().Truncate(time.Second)
	if o.Author != "" {
		d.About.Author = o.Author
	}
	d.About.History = append(slices.Clone(d.About.History), config.Step{Created: d.About.Built, CreatedBy: "smartvm commit", Comment: o.Comment})
	text, err := d.Text()
	if err != nil {
		return nil, err
	}
	return pack.New(text, append(slices.Clone(below.Layers), layer))
}
