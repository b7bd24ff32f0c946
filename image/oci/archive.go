package oci

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/internal/imagename"
	"push.rocks/smartvm/internal/stream"
)

// inArchive finds an image in a tar.
func inArchive(ctx context.Context, rest string, o Options) (f found, err error) {
	file, ref := cutRef(rest)
	r, err := os.Open(file)
	if err != nil {
		return found{}, notExist(err)
	}
	b := bufio.NewReader(r)
	if stream.Packing(b) != "" {
		f, err = inSpool(ctx, b, place{ref, imagename.OfPath(file)}, o)
		return f, errors.Join(err, r.Close())
	}
	return readArchive(r, place{ref, imagename.OfPath(file)})
}

// place is where an image is in an archive.
type place struct {
	ref  string // its name there; empty: there is only one
	base string // what it is called here if it has no name
}

// inSpool finds an image in a stream, which may be packed.
func inSpool(ctx context.Context, r io.Reader, at place, o Options) (found, error) {
	tmp, err := os.CreateTemp(o.TempDir, "archive-")
	if err != nil {
		return found{}, err
	}
	err = os.Remove(tmp.Name()) // it goes with the process
	if err == nil {
		err = stream.Unpack(&capped{ctx: ctx, w: tmp, max: o.Limits.OrDefaults().MaxBytes}, r)
	}
	if err != nil {
		return found{}, errors.Join(fmt.Errorf("read archive: %w", err), tmp.Close())
	}
	return readArchive(tmp, at)
}

// capped writes until a limit or a context's end.
type capped struct {
	ctx  context.Context
	w    io.Writer
	done int64
	max  int64
}

func (c *capped) Write(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	if c.done += int64(len(p)); c.done > c.max {
		return 0, &flatten.LimitError{What: "bytes of an archive", Limit: c.max, Option: "MaxBytes"}
	}
	return c.w.Write(p)
}

// archive is an unpacked tar.
type archive struct {
	file  *os.File
	parts map[string]part   // by name
	links map[string]string // symbolic ones
	blobs map[string]part   // by digest
}

// part is where a file's content is.
type part struct{ offset, size int64 }

// section is a part that is read. Closing it closes nothing.
type section struct{ *io.SectionReader }

func (section) Close() error { return nil }

func (a *archive) open(p part) section { return section{io.NewSectionReader(a.file, p.offset, p.size)} }

// maxParts is how many files an archive of images may have.
const maxParts = 1 << 16

// readArchive finds an image in a file, which is closed with the source or on error.
func readArchive(file *os.File, at place) (found, error) {
	a := &archive{file: file, parts: map[string]part{}, links: map[string]string{}, blobs: map[string]part{}}
	l := &local{close: file.Close, open: func(digest string) (io.ReadSeekCloser, error) {
		p, ok := a.blobs[digest]
		if !ok {
			p, ok = a.find(blobPath(digest))
		}
		if !ok {
			return nil, fmt.Errorf("blob %s: %w", digest, os.ErrNotExist)
		}
		return a.open(p), nil
	}}
	f, err := func() (found, error) {
		if err := a.index(); err != nil {
			return found{}, err
		}
		docker := func() (found, error) { return a.docker(l, at) }
		p, ok := a.find(layoutIndex)
		if !ok {
			return docker()
		}
		f, err := l.choose(a.open(p), at.base, at.ref)
		if _, both := a.find(dockerManifest); both {
			// Some versions of docker wrote indexes that lead nowhere beside it: moby/moby#47065, #47210.
			if errors.Is(err, ErrNotFound) {
				return docker()
			}
			f.instead = docker
		}
		return f, err
	}()
	if err != nil {
		return found{}, errors.Join(fmt.Errorf("read archive: %w", err), file.Close())
	}
	return f, nil
}

// index notes where everything is.
func (a *archive) index() error {
	if _, err := a.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	for t := tar.NewReader(a.file); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(a.parts)+len(a.links) >= maxParts {
			return &flatten.LimitError{What: "files in an archive", Limit: maxParts}
		}
		n := inTar(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			// The tar's reader stands where the content begins.
			offset, err := a.file.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			a.parts[n] = part{offset, h.Size}
			delete(a.links, n)
		case tar.TypeSymlink:
			a.links[n] = h.Linkname
			delete(a.parts, n)
		case tar.TypeLink: // of tools that have packed a save again
			to := inTar(h.Linkname)
			if p, ok := a.parts[to]; ok {
				a.parts[n] = p
				delete(a.links, n)
			} else if text, ok := a.links[to]; ok {
				a.links[n] = text
				delete(a.parts, n)
			}
		}
	}
}

// inTar makes a name comparable.
func inTar(n string) string { return strings.TrimPrefix(path.Clean("/"+n), "/") }

// find looks a file up, through one symbolic link: docker used to write them for layers that images
// share.
func (a *archive) find(n string) (part, bool) {
	if to, ok := a.links[n]; ok {
		n = inTar(path.Join("/", path.Dir(n), to))
	}
	p, ok := a.parts[n]
	return p, ok
}

// docker finds an image as docker save writes it, or did.
func (a *archive) docker(l *local, at place) (found, error) {
	p, ok := a.find(dockerManifest)
	if !ok {
		return found{}, fmt.Errorf("%w: neither %s nor %s is in it", ErrNotFound, layoutIndex, dockerManifest)
	}
	text, err := readSmall(a.open(p))
	if err != nil {
		return found{}, err
	}
	var images []dockerImage
	if err := json.Unmarshal(text, &images); err != nil {
		return found{}, fmt.Errorf("read %s: %w", dockerManifest, err)
	}
	var names, keys []string
	var chosen []dockerImage
	for _, i := range images {
		name := ""
		if len(i.RepoTags) > 0 {
			name = i.RepoTags[0]
		}
		if at.ref != "" {
			name = imagename.OfText(at.ref)
			if !slices.ContainsFunc(i.RepoTags, func(t string) bool { return imagename.OfText(t) == name }) {
				continue
			}
		}
		names, keys, chosen = append(names, imagename.Given(name, at.base)),
			append(keys, i.Config+" "+strings.Join(i.Layers, " ")), append(chosen, i)
	}
	one, err := only(names, keys)
	if err != nil {
		return found{}, err
	}
	d, err := a.document(chosen[one])
	if err != nil {
		return found{}, err
	}
	text, err = json.Marshal(map[string]any{"config": d.Config, "layers": d.Layers})
	return found{from: l, name: names[one], text: text, id: d.Config.Digest}, err
}

// dockerImage is an image of docker's: file names, and tags if it has any.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// document makes a manifest of what is none.
func (a *archive) document(i dockerImage) (d manifest.Document, err error) {
	if len(i.Layers) > maxLayers {
		return manifest.Document{}, &flatten.LimitError{What: "layers", Limit: maxLayers}
	}
	if d.Config, err = a.describe(i.Config); err != nil {
		return manifest.Document{}, err
	}
	for _, n := range i.Layers {
		l, err := a.describe(n)
		if err != nil {
			return manifest.Document{}, err
		}
		d.Layers = append(d.Layers, l)
	}
	return d, nil
}

// describe makes a blob of a file.
func (a *archive) describe(n string) (manifest.Descriptor, error) {
	p, ok := a.find(inTar(n))
	if !ok {
		return manifest.Descriptor{}, fmt.Errorf("%w: %q is missing in it", ErrNotFound, n)
	}
	h := sha256.New()
	if _, err := io.Copy(h, a.open(p)); err != nil {
		return manifest.Descriptor{}, err
	}
	d := manifest.Descriptor{Digest: manifest.DigestOf(h), Size: p.size}
	a.blobs[d.Digest] = p
	return d, nil
}
