package give_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/image/oci/ocitest"
)

// loaded is what docker load makes of an archive.
type loaded struct {
	ID   string // as docker shows it
	Tags []string
}

// archived are the files of an archive, by name.
func archived(t testing.TB, archive []byte) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		if h.Typeflag != tar.TypeReg || all[h.Name] != nil {
			t.Errorf("%s is there twice, or of the type %q", h.Name, h.Typeflag)
		}
		if all[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func decode(t testing.TB, text []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(text, v); err != nil {
		t.Fatalf("%v: %.200s", err, text)
	}
}

// dockerLoad does what docker load does, from version 20.10 on: image/tarexport/load.go of
// https://github.com/moby/moby.
func dockerLoad(t testing.TB, files map[string][]byte) (all []loaded) {
	t.Helper()
	var images []struct {
		Config           string
		RepoTags, Layers []string
	}
	decode(t, files["manifest.json"], &images)
	for _, i := range images {
		var c struct {
			OS     string
			RootFS *struct {
				Type    string
				DiffIDs []string `json:"diff_ids"`
			}
		}
		decode(t, files[i.Config], &c)
		if c.OS != "linux" || c.RootFS == nil || c.RootFS.Type != "layers" || len(c.RootFS.DiffIDs) != len(i.Layers) {
			t.Fatalf("configuration %s and layers %q", files[i.Config], i.Layers)
		}
		for n, l := range i.Layers {
			if got := manifest.Digest(dockerUnpack(t, files[l])); got != c.RootFS.DiffIDs[n] {
				t.Errorf("layer %d is %s, want %s", n, got, c.RootFS.DiffIDs[n])
			}
		}
		id := strings.TrimPrefix(manifest.Digest(files[i.Config]), manifest.Algorithm)
		all = append(all, loaded{id, i.RepoTags})
	}
	return all
}

// dockerUnpack knows gzip, as 20.10 does. bzip2 and xz it knows too, and zstd since 23.0.
func dockerUnpack(t testing.TB, layer []byte) []byte {
	t.Helper()
	if !bytes.HasPrefix(layer, []byte{0x1f, 0x8b, 0x08}) {
		return layer
	}
	z, err := gzip.NewReader(bytes.NewReader(layer))
	if err == nil {
		layer, err = io.ReadAll(z)
	}
	if err != nil {
		t.Fatal(err)
	}
	return layer
}

// containerdLoad does what docker load does where containerd keeps the images:
// images/archive/importer.go of https://github.com/containerd/containerd. It returns names by what
// is called so.
func containerdLoad(t testing.TB, files map[string][]byte) map[string]string {
	t.Helper()
	var layout struct{ ImageLayoutVersion string }
	decode(t, files["oci-layout"], &layout)
	if layout.ImageLayoutVersion != "1.0.0" {
		t.Errorf("layout of version %q", layout.ImageLayoutVersion)
	}
	for n, text := range files {
		if digits, ok := strings.CutPrefix(n, "blobs/sha256/"); ok && manifest.Digest(text) != manifest.Algorithm+digits {
			t.Errorf("%s is %s", n, manifest.Digest(text))
		}
	}
	there := func(d manifest.Descriptor) []byte {
		text, ok := files["blobs/"+strings.Replace(d.Digest, ":", "/", 1)]
		if !ok || int64(len(text)) != d.Size {
			t.Errorf("%s of %d bytes is not there: it has %d", d.Digest, d.Size, len(text))
		}
		return text
	}
	index, err := manifest.Read(files["index.json"], manifest.TypeIndex)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, m := range index.Manifests {
		d, err := manifest.Read(there(m), m.MediaType)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range append(d.Layers, d.Config) {
			there(part)
		}
		all[m.Annotations["io.containerd.image.name"]] = m.Digest
	}
	return all
}

// docker load takes what is saved, with docker's own store of images and with containerd's.
func TestSave_DockerLoad(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	d, err := ocitest.Add(dir, "amd64", layer(0), layer(0), layer(1)) // a layer twice
	if err == nil {
		err = ocitest.Tag(dir, "1", d)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := open(t)
	pulled := pull(t, s, "oci:"+dir+":1", "registry.example:5000/team/app:1")
	path, _, err := s.Root(t.Context(), pulled)
	if err == nil {
		_, err = s.Import(t.Context(), image.ImportOptions{Name: "mine", Rootfs: path})
	}
	if err != nil {
		t.Fatal(err)
	}
	for name, tag := range map[string]string{pulled.Name: pulled.Name, "mine": "mine:latest"} {
		files := archived(t, save(t, s, name))
		got := dockerLoad(t, files)
		if len(got) != 1 || name == pulled.Name && got[0].ID != pulled.ID || !cmp.Equal(got[0].Tags, []string{tag}) {
			t.Errorf("%s: docker load makes %+v of it, want %s called %s", name, got, pulled.ID, tag)
		}
		whole := tag
		if name == "mine" {
			whole = "docker.io/library/" + tag
		}
		named := containerdLoad(t, files)
		if len(named) != 1 || name == pulled.Name && named[whole] != pulled.Digest || named[whole] == "" {
			t.Errorf("%s: containerd makes %q of it, want %s called %s", name, named, pulled.Digest, whole)
		}
	}
}
