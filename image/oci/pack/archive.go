package pack

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"

	"push.rocks/smartvm/image/oci/manifest"
)

// Archive writes an OCI layout as a tar with docker's list beside it, as docker save does since
// version 25: docker load, podman load, skopeo and whatever reads OCI archives take it. The same
// image gives the same bytes. Names are what it is called there; those that are no references with
// a tag are left out. Progress, if not nil, is told how many bytes of the layers are done.
func (i *Image) Archive(ctx context.Context, w io.Writer, names []string, progress func(done, total int64)) error {
	index, list, err := i.indexes(names)
	if err != nil {
		return err
	}
	a := &archiver{ctx: ctx, tar: tar.NewWriter(w), total: i.Size(), progress: progress, seen: map[string]bool{}}
	a.dir("blobs/")
	a.dir("blobs/sha256/")
	for _, l := range i.Layers {
		a.layer(l)
	}
	a.text(blob(i.config.Digest), i.Config)
	a.text(blob(i.Digest), i.Manifest)
	a.text("index.json", index)
	a.text("manifest.json", list)
	a.text("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	if a.err == nil {
		a.err = a.tar.Close()
	}
	return a.err
}

func blob(digest string) string { return "blobs/" + strings.Replace(digest, ":", "/", 1) }

// indexes are index.json and manifest.json.
func (i *Image) indexes(names []string) (index, list []byte, err error) {
	var entries []manifest.Descriptor
	tags := []string{}
	for _, n := range names {
		tag, err := name.NewTag(n)
		if err != nil {
			continue // "base:latest" is one, an image by its digest is none
		}
		whole := strings.Replace(tag.Name(), name.DefaultRegistry+"/", "docker.io/", 1)
		entries = append(entries, manifest.Descriptor{
			MediaType: i.Type, Digest: i.Digest, Size: int64(len(i.Manifest)),
			Annotations: map[string]string{"io.containerd.image.name": whole, "org.opencontainers.image.ref.name": tag.TagStr()},
		})
		tags = append(tags, strings.TrimPrefix(strings.TrimPrefix(whole, "docker.io/"), "library/"))
	}
	if entries == nil {
		entries = []manifest.Descriptor{{MediaType: i.Type, Digest: i.Digest, Size: int64(len(i.Manifest))}}
	}
	layers := []string{}
	for _, l := range i.Layers {
		layers = append(layers, blob(l.Digest))
	}
	index, err = json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": manifest.TypeIndex, "manifests": entries})
	if err != nil {
		return nil, nil, err
	}
	list, err = json.Marshal([]any{map[string]any{"Config": blob(i.config.Digest), "RepoTags": tags, "Layers": layers}})
	return index, list, err
}

// archiver writes until an error.
type archiver struct {
	ctx         context.Context
	tar         *tar.Writer
	done, total int64
	progress    func(done, total int64)
	seen        map[string]bool // layers: an image may have one twice
	err         error
}

func (a *archiver) header(h *tar.Header) {
	h.ModTime = time.Unix(0, 0)
	if a.err == nil {
		a.err = a.tar.WriteHeader(h)
	}
}

func (a *archiver) dir(name string) {
	a.header(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755})
}

func (a *archiver) text(name string, text []byte) {
	a.header(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text))})
	if a.err == nil {
		_, a.err = a.tar.Write(text)
	}
}

func (a *archiver) layer(l Layer) {
	if a.err != nil || a.seen[l.Digest] {
		a.done += l.Size
		return
	}
	a.seen[l.Digest] = true
	f, err := os.Open(l.Path)
	if err != nil {
		a.err = err
		return
	}
	a.header(&tar.Header{Typeflag: tar.TypeReg, Name: blob(l.Digest), Mode: 0o644, Size: l.Size})
	if a.err == nil {
		a.err = l.verified(a.tar, &reader{a.ctx, f, func(n int) {
			if a.done += int64(n); a.progress != nil {
				a.progress(a.done, a.total)
			}
		}})
	}
	if a.err = errors.Join(a.err, f.Close()); a.err != nil {
		a.err = fmt.Errorf("write archive: %w", a.err)
	}
}

// reader tells what was read, and ends with its context.
type reader struct {
	ctx  context.Context
	r    io.Reader
	tell func(n int)
}

func (r *reader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	n, err := r.r.Read(p)
	r.tell(n)
	return n, err
}
