// Package ocitest makes container images for tests and benchmarks: OCI layouts, and a registry that
// serves one.
package ocitest

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Layer writes a layer's entries.
type Layer func(w *tar.Writer) error

// Descriptor points to a part of an image.
type Descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Platform    map[string]string `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

const (
	mediaManifest = "application/vnd.oci.image.manifest.v1+json"
	mediaIndex    = "application/vnd.oci.image.index.v1+json"
	mediaConfig   = "application/vnd.oci.image.config.v1+json"
	mediaLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// config is what Add gives an image to run.
func config() map[string]any {
	return map[string]any{
		"Entrypoint": []string{"/bin/init"}, "Cmd": []string{"--quiet"}, "Env": []string{"PATH=/bin"},
		"User": "1:2", "WorkingDir": "/srv", "StopSignal": "SIGINT",
		"ExposedPorts": map[string]any{
			"443/tcp": struct{}{}, "80": struct{}{}, "80/tcp": struct{}{}, "53/UDP": struct{}{}, "70000/tcp": struct{}{},
			"5000/sctp": struct{}{}, "x": nil,
		},
		"Volumes": map[string]any{"/srv/db/": struct{}{}, "/data": struct{}{}, "data": nil, "/": nil, "/../x/../y": nil},
		"Healthcheck": map[string]any{
			"Test": []string{"CMD", "/bin/check"}, "Interval": 30_000_000_000, "Timeout": 1_000_000_000,
			"StartPeriod": 5_000_000_000, "StartInterval": 500_000_000, "Retries": 3,
		},
	}
}

// Add adds an image of gzip layers, the lowest first, to the layout in dir, which is made if need
// be. It is tagged by Tag or AddIndex.
func Add(dir, arch string, layers ...Layer) (Descriptor, error) {
	manifest := map[string]any{"schemaVersion": 2, "mediaType": mediaManifest}
	var blobs []Descriptor
	var diffIDs []string
	for _, l := range layers {
		d, diffID, err := addLayer(dir, l)
		if err != nil {
			return Descriptor{}, err
		}
		blobs, diffIDs = append(blobs, d), append(diffIDs, diffID)
	}
	c, err := addJSON(dir, mediaConfig, map[string]any{
		"os": "linux", "architecture": arch, "config": config(),
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	if err != nil {
		return Descriptor{}, err
	}
	manifest["config"], manifest["layers"] = c, blobs
	d, err := addJSON(dir, mediaManifest, manifest)
	d.Platform = map[string]string{"os": "linux", "architecture": arch}
	return d, err
}

// AddIndex adds an image for several machines.
func AddIndex(dir string, images ...Descriptor) (Descriptor, error) {
	return addJSON(dir, mediaIndex, map[string]any{"schemaVersion": 2, "mediaType": mediaIndex, "manifests": images})
}

// Tag names an image.
func Tag(dir, tag string, d Descriptor) error {
	index, err := readIndex(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d.Annotations = map[string]string{"org.opencontainers.image.ref.name": tag}
	index.SchemaVersion, index.Manifests = 2, append(index.Manifests, d)
	text, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o600),
		os.WriteFile(filepath.Join(dir, "index.json"), text, 0o600),
	)
}

type index struct {
	SchemaVersion int          `json:"schemaVersion"`
	Manifests     []Descriptor `json:"manifests"`
}

func readIndex(dir string) (i index, err error) {
	text, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err == nil {
		err = json.Unmarshal(text, &i)
	}
	return i, err
}

// Blob is the path of a blob.
func Blob(dir, digest string) string {
	return filepath.Join(dir, "blobs", filepath.FromSlash(strings.Replace(digest, ":", "/", 1)))
}

func addJSON(dir, mediaType string, v any) (Descriptor, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return Descriptor{}, err
	}
	d, err := addBlob(dir, func(w io.Writer) error {
		_, err := w.Write(text)
		return err
	})
	d.MediaType = mediaType
	return d, err
}

func addLayer(dir string, l Layer) (d Descriptor, diffID string, err error) {
	plain := sha256.New()
	d, err = addBlob(dir, func(w io.Writer) error {
		z := gzip.NewWriter(w)
		t := tar.NewWriter(io.MultiWriter(z, plain))
		return errors.Join(l(t), t.Close(), z.Close())
	})
	d.MediaType = mediaLayer
	return d, "sha256:" + hex.EncodeToString(plain.Sum(nil)), err
}

func addBlob(dir string, write func(w io.Writer) error) (Descriptor, error) {
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o700); err != nil {
		return Descriptor{}, err
	}
	f, err := os.CreateTemp(blobs, "new-")
	if err != nil {
		return Descriptor{}, err
	}
	h := sha256.New()
	err = write(io.MultiWriter(f, h))
	size, serr := f.Seek(0, io.SeekCurrent)
	if err = errors.Join(err, serr, f.Close()); err != nil {
		return Descriptor{}, err
	}
	digest := hex.EncodeToString(h.Sum(nil))
	return Descriptor{Digest: "sha256:" + digest, Size: size}, os.Rename(f.Name(), filepath.Join(blobs, digest))
}

// Registry serves a layout, under whatever repository name: blobs by digest, with byte ranges, and
// manifests by tag too.
func Registry(dir string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, what, ok := strings.Cut(r.URL.Path, "/manifests/")
		if !ok {
			if _, digest, ok := strings.Cut(r.URL.Path, "/blobs/"); ok {
				http.ServeFile(w, r, Blob(dir, digest))
			}
			return
		}
		index, err := readIndex(dir)
		if err != nil {
			http.NotFound(w, r)
			return
		}
		for _, d := range index.Manifests {
			if d.Annotations["org.opencontainers.image.ref.name"] == what {
				what = d.Digest
			}
		}
		var doc struct{ MediaType string }
		if text, err := os.ReadFile(Blob(dir, what)); err == nil && json.Unmarshal(text, &doc) == nil {
			w.Header().Set("Content-Type", doc.MediaType)
			w.Header().Set("Docker-Content-Digest", what)
		}
		http.ServeFile(w, r, Blob(dir, what))
	})
}

// Mixed is a layer of about size bytes in files of 100 bytes to 4 MiB, which pack to about 40 %.
// Different seeds give different files, in directories that they share.
func Mixed(size int64, seed uint64) Layer {
	return func(w *tar.Writer) error {
		random := rand.New(rand.NewPCG(seed, 1))
		words := make([]string, 4096)
		for i := range words {
			words[i] = fmt.Sprintf("%x ", random.Uint64()>>(8*random.UintN(7)))
		}
		for n := 0; size > 0; n++ {
			// Most files are small, most bytes are in large ones.
			length := min(int64(100)<<random.UintN(16)+random.Int64N(100), size)
			body := make([]byte, 0, length+20)
			for int64(len(body)) < length {
				body = append(body, words[random.UintN(uint(len(words)))]...)
			}
			h := &tar.Header{
				Typeflag: tar.TypeReg, Name: fmt.Sprintf("usr/share/dir%d/file-%d-%d", n%50, seed, n),
				Mode: 0o644, Size: length, ModTime: time.Unix(1_700_000_000+int64(n), 0),
			}
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			if _, err := w.Write(body[:length]); err != nil {
				return err
			}
			size -= length
		}
		return nil
	}
}
