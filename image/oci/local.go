package oci

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/imagename"
)

// local is a source in files.
type local struct {
	open  func(digest string) (io.ReadSeekCloser, error)
	close func() error
}

func (l *local) blob(_ context.Context, digest string, offset int64) (*download.Body, error) {
	f, err := l.open(digest)
	if err != nil {
		return nil, notExist(err)
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &download.Body{ReadCloser: f, Start: offset}, nil
}

func (l *local) manifest(ctx context.Context, digest string) (text []byte, err error) {
	r, err := l.blob(ctx, digest, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return readSmall(r)
}

func (l *local) elsewhere(string, error) bool { return false }

func (l *local) Close() error { return l.close() }

// notExist is ErrNotFound for a missing file.
func notExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return err
}

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

// inLayout finds an image in an OCI layout:
// https://github.com/opencontainers/image-spec/blob/main/image-layout.md
func inLayout(rest string) (found, error) {
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
		return l.choose(index, imagename.OfPath(dir), ref)
	}()
	if err != nil {
		return found{}, errors.Join(err, root.Close())
	}
	return f, nil
}

// choose picks what a layout's index calls ref, or all of it. base is the image's name if it has
// none.
func (l *local) choose(index io.Reader, base, ref string) (found, error) {
	text, err := readSmall(index)
	if err != nil {
		return found{}, err
	}
	d, err := manifest.Read(text, manifest.TypeIndex)
	if err != nil {
		return found{}, fmt.Errorf("%s: %w", layoutIndex, err)
	}
	var names []string
	named := map[string][]manifest.Descriptor{}
	for _, m := range d.Manifests {
		tag := m.Annotations["org.opencontainers.image.ref.name"]
		full := imagename.Given(cmp.Or(m.Annotations["io.containerd.image.name"], tag), base)
		if ref != "" && ref != tag && imagename.OfText(ref) != full {
			continue
		}
		if named[full] == nil {
			names = append(names, full)
		}
		if !slices.ContainsFunc(named[full], func(d manifest.Descriptor) bool { return d.Digest == m.Digest }) {
			named[full] = append(named[full], m)
		}
	}
	var keys []string
	for _, n := range names {
		var digests []string
		for _, d := range named[n] {
			digests = append(digests, d.Digest)
		}
		slices.Sort(digests)
		keys = append(keys, strings.Join(digests, " "))
	}
	one, err := only(names, keys)
	if err != nil {
		return found{}, err
	}
	text, err = json.Marshal(map[string]any{"manifests": named[names[one]]})
	return found{from: l, name: names[one], text: text}, err
}

// only makes sure that there is one image and returns its first place in names. One image may have
// several names; keys, as many as names, tell images apart.
func only(names, keys []string) (int, error) {
	if len(names) == 0 {
		return 0, ErrNotFound
	}
	if len(slices.Compact(slices.Sorted(slices.Values(keys)))) == 1 {
		return 0, nil
	}
	err := fmt.Errorf("there are several images, name one of: %.1000s", strings.Join(names, ", "))
	return 0, hint.Add(err,
		"docker-archive:FILE:NAME and oci:DIR:NAME take one of several; what comes on standard input has to be put into a file for that")
}

// inDir finds an image in a directory as skopeo's dir: writes it: manifests and blobs by the digits
// of their digests.
func inDir(dir string) (found, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return found{}, notExist(err)
	}
	l := &local{close: root.Close, open: func(digest string) (io.ReadSeekCloser, error) {
		digits := strings.TrimPrefix(digest, manifest.Algorithm)
		f, err := root.Open(digits)
		if errors.Is(err, os.ErrNotExist) {
			return root.Open(digits + "." + dockerManifest)
		}
		return f, err
	}}
	text, err := func() (text []byte, err error) {
		f, err := root.Open(dockerManifest)
		if err != nil {
			return nil, notExist(err)
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		return readSmall(f)
	}()
	if err != nil {
		return found{}, errors.Join(err, root.Close())
	}
	return found{from: l, name: imagename.Given("", imagename.OfPath(dir)), text: text}, nil
}
