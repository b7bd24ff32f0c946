package oci_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/ocitest"
)

// entry is one of an archive.
type entry struct {
	name string
	kind byte
	text string // content, or target of a link
}

func archive(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Typeflag: e.kind, Name: e.name, Mode: 0o644}
		if e.kind == tar.TypeReg {
			h.Size = int64(len(e.text))
		} else {
			h.Linkname = e.text
		}
		err := w.WriteHeader(h)
		if err == nil && e.kind == tar.TypeReg {
			_, err = io.WriteString(w, e.text)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// save is an image as docker save of v25 and later has it: a layout, and a list of images beside
// its index.
type save struct {
	blobs    []entry
	manifest ocitest.Descriptor
	config   string // its file's name
	layers   []string
	chain    string
}

func newSave(t testing.TB, layers ...ocitest.Layer) *save {
	t.Helper()
	dir := t.TempDir()
	s := &save{manifest: add(t, dir, "1", layers...)}
	file := func(digest string) string { return "blobs/" + strings.Replace(digest, ":", "/", 1) }
	doc := manifestOf(t, dir, s.manifest)
	s.config = file(doc["config"].(map[string]any)["digest"].(string))
	for _, l := range doc["layers"].([]any) {
		s.layers = append(s.layers, file(l.(map[string]any)["digest"].(string)))
	}
	for _, n := range append([]string{file(s.manifest.Digest), s.config}, s.layers...) {
		text, err := os.ReadFile(filepath.Join(dir, n))
		if err != nil {
			t.Fatal(err)
		}
		s.blobs = append(s.blobs, entry{n, tar.TypeReg, string(text)})
	}
	s.blobs = slices.Clip(s.blobs) // tests append to it
	s.chain = resolve(t, "oci:"+dir, oci.Options{}).Chain
	return s
}

func text(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// index is a layout's, with a descriptor for each name.
func (s *save) index(t testing.TB, names ...string) entry {
	t.Helper()
	all := []ocitest.Descriptor{}
	for _, n := range names {
		d := s.manifest
		d.Platform = nil
		if n != "" {
			_, tag, _ := strings.Cut(n, ":")
			d.Annotations = map[string]string{
				"io.containerd.image.name":          "docker.io/library/" + n,
				"org.opencontainers.image.ref.name": tag,
			}
		}
		all = append(all, d)
	}
	return entry{"index.json", tar.TypeReg, text(t, map[string]any{"schemaVersion": 2, "manifests": all})}
}

// list is docker's manifest.json.
func (s *save) list(t testing.TB, names ...string) entry {
	t.Helper()
	return entry{
		"manifest.json", tar.TypeReg,
		text(t, []any{map[string]any{"Config": s.config, "RepoTags": names, "Layers": s.layers}}),
	}
}

// What docker save has written in its versions is read, from a pipe too.
func TestResolve_DockerSave(t *testing.T) {
	s, other := newSave(t, files("a")), newSave(t, files("b"))
	null := entry{"index.json", tar.TypeReg, `{"schemaVersion":2,"manifests":null}`}
	empty := text(t,
		map[string]any{
			"schemaVersion": 2, "config": map[string]any{"digest": "sha256:" + filepath.Base(s.config)},
			"layers": []any{},
		})
	broken := *s
	broken.blobs = append([]entry{}, s.blobs...)
	hollow := blobEntry(empty)
	broken.manifest.Digest, broken.manifest.Size = "sha256:"+filepath.Base(hollow.name), int64(len(empty))
	linked := func(kind byte, target string) []entry {
		return []entry{
			{"l0/layer.tar", tar.TypeReg, s.blobs[2].text},
			{"l1/layer.tar", kind, target},
			{"c.json", tar.TypeReg, s.blobs[1].text},
			{
				"manifest.json", tar.TypeReg,
				text(t, []any{
					map[string]any{"Config": "c.json", "RepoTags": []string{"app:1"}, "Layers": []string{"l1/layer.tar"}},
				}),
			},
		}
	}
	for _, c := range []struct {
		name    string
		entries []entry
		want    string // what the image is called
		err     string
	}{
		{name: "one tag", entries: append(s.blobs, s.index(t, "app:1"), s.list(t, "app:1")), want: "app:1"},
		{
			name:    "two tags of one image",
			entries: append(s.blobs, s.index(t, "app:1", "app:latest"), s.list(t, "app:1", "app:latest")), want: "app:1",
		},
		{name: "two tags, no list", entries: append(s.blobs, s.index(t, "app:1", "app:latest")), want: "app:1"},
		{name: "two tags, no index", entries: append(s.blobs, s.list(t, "app:1", "app:latest")), want: "app:1"},
		{
			name:    "two images",
			entries: slices.Concat(s.blobs, other.blobs, []entry{twoIndexes(t, s.index(t, "app:1"), other.index(t, "app:2"))}),
			err:     "name one of: app:1, app:2",
		},
		{name: "an index that is null", entries: append(s.blobs, null, s.list(t, "app:1")), want: "app:1"},
		{name: "an index that is null, and nothing else", entries: append(s.blobs, null), err: "no such image"},
		{
			name: "an index of what is not there", entries: append(s.blobs, other.index(t, "app:1"), s.list(t, "app:1")),
			want: "app:1",
		},
		{
			name: "a manifest without layers", entries: append(s.blobs, hollow, broken.index(t, "app:1"), s.list(t, "app:1")),
			want: "app:1",
		},
		{
			name: "a manifest without layers, and nothing else", entries: append(s.blobs, hollow, broken.index(t, "app:1")),
			err: "0, and 1 in the configuration",
		},
		{name: "saved by id", entries: append(s.blobs, s.index(t, ""), s.list(t)), want: "image:latest"},
		{name: "a layer as symbolic link", entries: linked(tar.TypeSymlink, "../l0/layer.tar"), want: "app:1"},
		{name: "a layer as hard link", entries: linked(tar.TypeLink, "l0/layer.tar"), want: "app:1"},
		{name: "a hard link to nothing", entries: linked(tar.TypeLink, "l2/layer.tar"), err: "is missing in it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			i, err := oci.Resolve(t.Context(), "-",
				oci.Options{Stdin: bytes.NewReader(archive(t, c.entries...)), TempDir: t.TempDir()})
			if err != nil {
				if c.err == "" || !strings.Contains(err.Error(), c.err) {
					t.Errorf("%v, want %q", err, c.err)
				}
				return
			}
			defer i.Close()
			if i.Name != c.want || i.Chain != s.chain {
				t.Errorf("%s of %s, want %q of %s", i.Name, i.Chain, c.want, s.chain)
			}
			pull(t, i, t.TempDir())
		})
	}
}

func blobEntry(content string) entry {
	sum := sha256.Sum256([]byte(content))
	return entry{"blobs/sha256/" + hex.EncodeToString(sum[:]), tar.TypeReg, content}
}

// twoIndexes joins indexes.
func twoIndexes(t testing.TB, a, b entry) entry {
	t.Helper()
	var all [2]map[string]any
	if err := errors.Join(json.Unmarshal([]byte(a.text), &all[0]), json.Unmarshal([]byte(b.text), &all[1])); err != nil {
		t.Fatal(err)
	}
	all[0]["manifests"] = append(all[0]["manifests"].([]any), all[1]["manifests"].([]any)...)
	return entry{"index.json", tar.TypeReg, text(t, all[0])}
}

// An image that has no name is called after its file, in a way in which it can be asked for.
func TestResolve_Nameless(t *testing.T) {
	s := newSave(t, files("a"))
	tmp := t.TempDir()
	data := archive(t, append(s.blobs, s.index(t, ""))...)
	for file, want := range map[string]string{
		"app.tar": "app:latest", "My App.tar": "my-app:latest", "FOO.tar": "foo:latest", "Backup_2": "backup_2:latest",
		"a--b..c.tar": "a-b.c:latest",
		"x.tar.gz":    "x:latest", "日本.tar": "image:latest", "-.tar": "image:latest",
	} {
		path := filepath.Join(tmp, file)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, scheme := range []string{"docker-archive:", "oci-archive:"} {
			if i := resolve(t, scheme+path, oci.Options{}); i.Name != want {
				t.Errorf("%s: %q, want %q", file, i.Name, want)
			} else if _, err := name.ParseReference(i.Name); err != nil {
				t.Error(err)
			}
		}
	}
	for tag, want := range map[string]string{
		"v1": "my-layout:v1", "v1+build 5": "my-layout:v1-build-5", "x/y:2": "x/y:2",
		"!!": "my-layout:latest",
	} {
		dir := filepath.Join(t.TempDir(), "My Layout")
		d := add(t, dir, tag, files("a"))
		if i := resolve(t, "oci:"+dir+":"+tag, oci.Options{}); i.Name != want || i.Digest != d.Digest {
			t.Errorf("%q: %q, want %q", tag, i.Name, want)
		}
	}
}

// References that other tools know are followed, or say what to do.
func TestResolve_OtherForms(t *testing.T) {
	dir := t.TempDir()
	d := add(t, dir, "1", files("a"))
	s := serve(t, dir, nil)
	if i := resolve(t, "docker://"+s.host()+"/a:1", oci.Options{}); i.Digest != d.Digest || i.Name != s.host()+"/a:1" {
		t.Errorf("%+v", i)
	}
	flat := t.TempDir()
	for n, from := range map[string]string{"manifest.json": d.Digest, "version": ""} {
		content := []byte("Directory Transport Version: 1.1\n")
		if from != "" {
			content = []byte(text(t, manifestOf(t, dir, d)))
		}
		if err := os.WriteFile(filepath.Join(flat, n), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range newSave(t, files("a")).blobs[1:] {
		if err := os.WriteFile(filepath.Join(flat, filepath.Base(e.name)), []byte(e.text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pull(t, resolve(t, "dir:"+flat, oci.Options{}), t.TempDir())
	file := filepath.Join(t.TempDir(), "app.tar")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]string{
		"docker-daemon:app:1":      "docker save app:1 |",
		"containers-storage:app:1": "podman save app:1 |",
		dir:                        "say oci:" + dir,
		flat:                       "say dir:" + flat,
		file:                       "docker-archive:" + file,
		t.TempDir():                "--rootfs",
	} {
		_, err := oci.Resolve(t.Context(), ref, oci.Options{Transport: refuse{}})
		if diff := cmp.Diff([]bool{true, true}, []bool{oci.Local(ref), strings.Contains(adviceOf(err), want)}); diff != "" {
			t.Errorf("%s: %v, hint %q, want %q", ref, err, adviceOf(err), want)
		}
	}
	for _, ref := range []string{"debian:12", "docker:dind", "docker://a", "localhost:5000/a", "a.tar"} {
		if oci.Local(ref) {
			t.Errorf("%s is no file", ref)
		}
	}
}

// adviceOf is the hint of an error.
func adviceOf(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}
