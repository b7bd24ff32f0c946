package oci

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"push.rocks/smartvm/image/oci/flatten"
)

// local is a source in files.
type local struct {
	open  func(digest string) (io.ReadSeekCloser, error)
	close func() error
}

func (l *local) blob(_ context.Context, digest string, offset int64) (io.ReadCloser, int64, error) {
	f, err := l.open(digest)
	if err != nil {
		return nil, 0, notExist(err)
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, offset, nil
}

func (l *local) manifest(ctx context.Context, digest string) (text []byte, err error) {
	r, _, err := l.blob(ctx, digest, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return readSmall(r)
}

func (l *local) Close() error { return l.close() }

// cutRef splits PATH[:REF] where the path exists: both may have colons.
func cutRef(s string) (path, ref string) {
	for end := len(s); end > 0; end = strings.LastIndexByte(s[:end], ':') {
		if _, err := os.Lstat(s[:end]); err == nil {
			return s[:end], strings.TrimPrefix(s[end:], ":")
		}
	}
	path, ref, _ = strings.Cut(s, ":")
	return path, ref
}

// blobPath is where a layout has a blob.
func blobPath(digest string) string { return "blobs/" + strings.Replace(digest, ":", "/", 1) }

const (
	layoutIndex    = "index.json"
	dockerManifest = "manifest.json"
)

// inLayout finds an image in an OCI layout: https://github.com/opencontainers/image-spec/blob/main/image-layout.md
func inLayout(rest string, o Options) (found, error) {
	dir, ref := cutRef(rest)
	root, err := os.OpenRoot(dir)
	if err != nil {
		return found{}, notExist(err)
	}
	l := &local{
		open:  func(digest string) (io.ReadSeekCloser, error) { return root.Open(blobPath(digest)) },
		close: root.Close,
	}
	f, err := func() (f found, err error) {
		index, err := root.Open(layoutIndex)
		if err != nil {
			return found{}, notExist(err)
		}
		defer func() { err = errors.Join(err, index.Close()) }()
		return l.choose(index, filepath.Base(dir), ref)
	}()
	if err != nil {
		return found{}, errors.Join(err, root.Close())
	}
	return f, nil
}

// choose picks what a layout's index calls ref, or all of it. base is the image's name if it has none.
func (l *local) choose(index io.Reader, base, ref string) (found, error) {
	text, err := readSmall(index)
	if err != nil {
		return found{}, err
	}
	d, err := readDocument(text, typeIndex)
	if err != nil {
		return found{}, fmt.Errorf("%s: %w", layoutIndex, err)
	}
	var names []string
	chosen := document{index: true}
	for _, m := range d.Manifests {
		tag := m.Annotations["org.opencontainers.image.ref.name"]
		full := cmp.Or(m.Annotations["io.containerd.image.name"], tag)
		if !strings.ContainsAny(full, ":/") {
			full = base + ":" + cmp.Or(full, "latest")
		}
		full = familiarName(full)
		if ref == "" || ref == tag || familiarName(ref) == full {
			chosen.Manifests = append(chosen.Manifests, m)
			if !slices.Contains(names, full) {
				names = append(names, full)
			}
		}
	}
	return l.one(chosen, names)
}

// one returns what was chosen, if that is one thing.
func (l *local) one(d document, names []string) (found, error) {
	switch len(names) {
	case 0:
		return found{}, ErrNotFound
	case 1:
		parts := map[string]any{"config": d.Config, "layers": d.Layers}
		if d.index {
			parts = map[string]any{"manifests": d.Manifests}
		}
		text, err := json.Marshal(parts)
		return found{from: l, name: names[0], text: text}, err
	}
	return found{}, fmt.Errorf("there are several images, name one of: %.1000s", strings.Join(names, ", "))
}

// familiarName is familiar of a name that may be anything.
func familiarName(s string) string {
	ref, err := name.ParseReference(s)
	if err != nil {
		return s
	}
	return familiar(ref)
}

// inArchive finds an image in a tar.
func inArchive(ctx context.Context, rest string, o Options) (f found, err error) {
	file, ref := cutRef(rest)
	r, err := os.Open(file)
	if err != nil {
		return found{}, notExist(err)
	}
	b := bufio.NewReader(r)
	if flatten.Packing(b) != "" {
		f, err = inSpool(ctx, b, ref, o)
		return f, errors.Join(err, r.Close())
	}
	return readArchive(r, ref, strings.TrimSuffix(filepath.Base(file), ".tar"))
}

// inSpool finds an image in a stream, which may be packed.
func inSpool(ctx context.Context, r io.Reader, ref string, o Options) (found, error) {
	tmp, err := os.CreateTemp(o.TempDir, "archive-")
	if err != nil {
		return found{}, err
	}
	err = os.Remove(tmp.Name()) // it goes with the process
	if err == nil {
		err = flatten.Unpack(&capped{ctx: ctx, w: tmp, left: flatten.MaxBytes}, r)
	}
	if err != nil {
		return found{}, errors.Join(fmt.Errorf("read archive: %w", err), tmp.Close())
	}
	return readArchive(tmp, ref, "image")
}

// capped writes until a limit or a context's end.
type capped struct {
	ctx  context.Context
	w    io.Writer
	left int64
}

func (c *capped) Write(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	if c.left -= int64(len(p)); c.left < 0 {
		return 0, &flatten.LimitError{What: "bytes of an archive", Limit: flatten.MaxBytes}
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

// readArchive finds an image in a file, which is closed with the source or on error. base is its name if it has none.
func readArchive(file *os.File, ref, base string) (found, error) {
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
		if p, ok := a.find(layoutIndex); ok {
			return l.choose(a.open(p), base, ref)
		}
		return a.docker(l, base, ref)
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
		case tar.TypeSymlink:
			a.links[n] = h.Linkname
		}
	}
}

// inTar makes a name comparable.
func inTar(n string) string { return strings.TrimPrefix(path.Clean("/"+n), "/") }

// find looks a file up, through one symbolic link: docker used to write them for layers that images share.
func (a *archive) find(n string) (part, bool) {
	if to, ok := a.links[n]; ok {
		n = inTar(path.Join("/", path.Dir(n), to))
	}
	p, ok := a.parts[n]
	return p, ok
}

// docker finds an image as docker save writes it, or did.
func (a *archive) docker(l *local, base, ref string) (found, error) {
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
	var names []string
	var chosen dockerImage
	for _, i := range images {
		called := base + ":latest"
		if len(i.RepoTags) > 0 {
			called = familiarName(i.RepoTags[0])
		}
		if ref != "" {
			if !slices.ContainsFunc(i.RepoTags, func(t string) bool { return familiarName(t) == familiarName(ref) }) {
				continue
			}
			called = familiarName(ref)
		}
		names = append(names, called)
		chosen = i
	}
	var d document
	if len(names) == 1 {
		if d, err = a.document(chosen); err != nil {
			return found{}, err
		}
	}
	f, err := l.one(d, names)
	f.id = d.Config.Digest
	return f, err
}

// dockerImage is an image of docker's: file names, and tags if it has any.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// document makes a manifest of what is none.
func (a *archive) document(i dockerImage) (d document, err error) {
	if len(i.Layers) > maxLayers {
		return document{}, &flatten.LimitError{What: "layers", Limit: maxLayers}
	}
	if d.Config, err = a.describe(i.Config); err != nil {
		return document{}, err
	}
	for _, n := range i.Layers {
		l, err := a.describe(n)
		if err != nil {
			return document{}, err
		}
		d.Layers = append(d.Layers, l)
	}
	return d, nil
}

// describe makes a blob of a file.
func (a *archive) describe(n string) (descriptor, error) {
	p, ok := a.find(inTar(n))
	if !ok {
		return descriptor{}, fmt.Errorf("%w: %q is missing in it", ErrNotFound, n)
	}
	h := sha256.New()
	if _, err := io.Copy(h, a.open(p)); err != nil {
		return descriptor{}, err
	}
	d := descriptor{Digest: algorithm + hex.EncodeToString(h.Sum(nil)), Size: p.size}
	a.blobs[d.Digest] = p
	return d, nil
}
