package image_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/image/oci/ocitest"
	"push.rocks/smartvm/spec"
)

// toDockerHub leads what is asked of Docker Hub to a registry of the test.
type toDockerHub string

func (host toDockerHub) RoundTrip(r *http.Request) (*http.Response, error) {
	to := r.Clone(r.Context())
	to.URL.Scheme, to.URL.Host = "http", string(host)
	resp, err := http.DefaultTransport.RoundTrip(to)
	if err == nil {
		resp.Request = r // nobody is to know
	}
	return resp, err
}

// However a reference is written, what was pulled by another spelling of it is found; what is
// another image is not.
func TestFind(t *testing.T) {
	layout := filepath.Join(t.TempDir(), "layout")
	var index, manifest ocitest.Descriptor
	for _, tag := range []string{"12", "13"} {
		var err error
		if manifest, err = ocitest.Add(layout, "amd64", files(map[string]string{"etc/issue": tag})); err != nil {
			t.Fatal(err)
		}
		if index, err = ocitest.AddIndex(layout, manifest); err != nil {
			t.Fatal(err)
		}
		if err := ocitest.Tag(layout, tag, index); err != nil {
			t.Fatal(err)
		}
	}
	requests := 0
	host := serve(t, layout, func(*http.Request) { requests++ })
	s := open(t, storeDir(t), func(o *image.Options) { o.OCI.Transport = toDockerHub(host) })
	for _, ref := range []string{"debian:12", "docker.io/library/debian:13"} {
		if _, err := s.Pull(t.Context(), ref, ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Tag(t.Context(), "debian:13", "mine"); err != nil {
		t.Fatal(err)
	}
	importTiny(t, s, "docker.io/library/odd")
	i, err := s.Find("debian:13")
	if err != nil || i.Index != index.Digest || i.Digest != manifest.Digest || len(i.ID) != 64 {
		t.Fatalf("%+v, %v, want index %s and manifest %s", i, err, index.Digest, manifest.Digest)
	}
	requests = 0
	for ref, want := range map[string]string{
		"debian:13":                                    "debian:13",
		"docker.io/library/debian:13":                  "debian:13",
		"docker.io/debian:13":                          "debian:13",
		"index.docker.io/library/debian:13":            "debian:13",
		"library/debian:13":                            "debian:13",
		"debian:13@" + index.Digest:                    "debian:13",
		"debian@" + index.Digest:                       "debian:13",
		"docker.io/library/debian:any@" + index.Digest: "debian:13",
		"debian@" + manifest.Digest:                    "debian:13",
		"mine@" + manifest.Digest:                      "mine",
		manifest.Digest:                                "debian:13",
		index.Digest:                                   "debian:13",
		"sha256:" + i.ID:                               "debian:13",
		i.ID:                                           "debian:13",
		i.ID[:12]:                                      "debian:13",
		i.ID[:6]:                                       "debian:13",
		"mine":                                         "mine",
		"mine:latest":                                  "",
		"debian:12":                                    "debian:12",
		"debian":                                       "",
		"debian:14":                                    "",
		"ghcr.io/debian:13":                            "",
		"library/debian":                               "",
		"debian:13@sha256:" + strings.Repeat("0", 64): "",
		"debian:13@sha256:" + i.ID[:12]:               "",
		i.ID[:5]:                                      "",
		strings.ToUpper(i.ID[:12]):                    "",
		"0" + i.ID[:20]:                               "",
		"sha256:":                                     "",
		"odd":                                         "odd",
		"docker.io/library/odd":                       "odd",
		strings.Repeat("a", 4000):                     "",
		strings.Repeat("a", 300) + "@sha256:" + i.ID: "debian:13",
	} {
		got, err := s.Find(ref)
		if want == "" && !errors.Is(err, image.ErrNotFound) || want != "" && (err != nil || got.Name != want) {
			t.Errorf("%.100s: %+v, %v, want %q", ref, got, err, want)
		}
	}
	if requests > 0 {
		t.Errorf("%d requests were made", requests)
	}
	// What has one id under several names goes by name, or with all of them.
	if _, err := s.Remove(t.Context(), i.ID[:12], false); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("rm of an id with two names: %v", err)
	}
	if r, err := s.Remove(t.Context(), "docker.io/library/debian:13", false); err != nil ||
		cmp.Diff([]string{"debian:13"}, r.Images) != "" {
		t.Errorf("%+v, %v", r, err)
	}
	if in, err := s.Inspect(manifest.Digest); err != nil || in.Name != "mine" {
		t.Errorf("%+v, %v", in, err)
	}
	if r, err := s.Remove(t.Context(), i.ID[:12], false); err != nil || cmp.Diff([]string{"mine"}, r.Images) != "" {
		t.Errorf("%+v, %v", r, err)
	}
}

// What is pulled by tag and digest is found by them, and stays it when the tag moves on.
func TestFind_Pinned(t *testing.T) {
	layout := layoutOf(t, map[string][]ocitest.Layer{"1": {files(map[string]string{"a": "a"})}})
	var digest string
	host := serve(t, layout, func(r *http.Request) {
		if _, d, ok := strings.Cut(r.URL.Path, "/manifests/sha256:"); ok {
			digest = "sha256:" + d
		}
	})
	s := open(t, storeDir(t))
	i, err := s.Pull(t.Context(), host+"/app:1", "")
	if err != nil {
		t.Fatal(err)
	}
	pinned := host + "/app:1@" + i.Digest
	if got, err := s.Find(pinned); err != nil || got.Name != host+"/app:1" {
		t.Errorf("%+v, %v", got, err)
	}
	if i, err = s.Pull(t.Context(), pinned, ""); err != nil || digest != i.Digest || i.Name != host+"/app@"+digest {
		t.Errorf("asked for %s: %+v, %v", digest, i, err)
	}
	if got, err := s.Find(pinned); err != nil || got.Name != i.Name {
		t.Errorf("%+v, %v", got, err)
	}
}

// Nobody calls an image by a digest that it has not, and archives, which name themselves, do not
// either.
func TestPull_NamesItself(t *testing.T) {
	other := "debian@sha256:" + strings.Repeat("0", 64)
	layout := layoutOf(t, map[string][]ocitest.Layer{
		other:       {files(map[string]string{"a": "evil"})},
		"debian:12": {files(map[string]string{"a": "a"})},
	})
	s := open(t, storeDir(t))
	first := importTiny(t, s, "debian:12")
	if _, err := s.Import(t.Context(), image.ImportOptions{Name: other, Kernel: "x"}); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("import: %v", err)
	}
	if _, err := s.Tag(t.Context(), "debian:12", other); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("tag: %v", err)
	}
	if i, err := s.Pull(t.Context(), "oci:"+layout+":"+other, ""); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("pull: %+v, %v", i, err)
	}
	if i, err := s.Pull(t.Context(), "oci:"+layout+":"+other, "named"); err != nil || i.Replaced != nil {
		t.Errorf("pull with a name: %+v, %v", i, err)
	}
	// What had the name is told.
	i, err := s.Pull(t.Context(), "oci:"+layout+":debian:12", "")
	if err != nil || i.Replaced == nil || i.Replaced.ID != first.ID {
		t.Errorf("%+v, %v, want it to replace %+v", i, err, first)
	}
	if i, err = s.Pull(t.Context(), "oci:"+layout+":debian:12", ""); err != nil || i.Replaced != nil {
		t.Errorf("the same again replaces %+v, %v", i.Replaced, err)
	}
}

// An image whose description cannot be read keeps no other from anything, and can be removed.
func TestUnreadable(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"later": func(path string) error { // a field that a later version has
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(path, []byte(strings.Replace(string(text), "{", `{"signature": "x",`, 1)), 0o600)
		},
		"later version": func(path string) error {
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(path, []byte(strings.Replace(string(text), `"version": 1`, `"version": 7`, 1)), 0o600)
		},
		"cut off": func(path string) error { return os.Truncate(path, 10) },
		"rubbish": func(path string) error { return os.WriteFile(path, []byte("\x00\xff"), 0o600) },
		"huge":    func(path string) error { return os.Truncate(path, 1<<30) },
		"directory": func(path string) error {
			return errors.Join(os.Remove(path), os.Mkdir(path, 0o700))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := storeDir(t)
			s := open(t, dir)
			importTiny(t, s, "good")
			bad := importOther(t, s, "bad")
			file := filepath.Join(dir, "names", base64.RawURLEncoding.EncodeToString([]byte("bad"))+".json")
			if err := spoil(file); err != nil {
				t.Fatal(err)
			}
			all, err := s.List()
			if len(all) != 1 || all[0].Name != "good" || err == nil || !strings.Contains(err.Error(), "bad") {
				t.Errorf("list: %v, %v, want the good one, and the bad in the error", all, err)
			}
			if is := errors.Is(err, spec.ErrNotSupported); is != strings.HasPrefix(name, "later") {
				t.Errorf("list: %v is ErrNotSupported: %v", err, is)
			}
			if u, err := s.Usage(t.Context()); err != nil || u.Images != 2 {
				t.Errorf("usage: %+v, %v", u, err)
			}
			if r, err := s.Prune(t.Context(), image.PruneOptions{All: true}); err != nil ||
				cmp.Diff([]string{"good"}, r.Images) != "" {
				t.Errorf("prune: %+v, %v", r, err)
			}
			// What it mentions is not taken from under it: a later smartvm can use it still.
			if _, err := os.Stat(filepath.Join(dir, "objects", bad.Root)); (strings.HasPrefix(name, "later") ||
				name == "directory") && err != nil {
				t.Error(err)
			}
			if r, err := s.Remove(t.Context(), "bad", false); err != nil || cmp.Diff([]string{"bad"}, r.Images) != "" {
				t.Errorf("remove: %+v, %v", r, err)
			}
			if got := tree(t, filepath.Join(dir, "names")); len(got) > 0 {
				t.Errorf("left: %v", got)
			}
			wantSound(t, s, dir)
			if _, err := os.Stat(filepath.Join(dir, "objects", bad.Root)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("what it had is still there: %v", err)
			}
		})
	}
}

// importOther imports another root than importTiny's.
func importOther(t *testing.T, s *image.Store, name string) *image.Image {
	t.Helper()
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "other"), []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	i, err := s.Import(t.Context(), image.ImportOptions{Name: name, Rootfs: root})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// A bundle that an image has makes no room for others; one whose bundle is gone all the same is
// listed, and pulled again.
func TestBase_Evicted(t *testing.T) {
	kernel, _ := sources(t)
	work, dir := t.TempDir(), storeDir(t)
	manifest := filepath.Join(work, "manifest.json")
	content := make([]byte, 4096)
	copy(content, "hsqs")
	if err := os.WriteFile(filepath.Join(work, "rootfs"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	bundles, err := base.Open(base.Options{
		Dir: filepath.Join(work, "bundles"), ManifestPath: manifest, Arch: "x86_64", InUse: image.InUse,
		Named: image.Bundles(dir), MaxStored: 1,
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, dir, func(o *image.Options) { o.Base = bundles })
	pull := func(n int, name string) {
		t.Helper()
		text := fmt.Sprintf(`{"schemaVersion": 1, "bundleId": "mine-%d", "name": "mine", "arch": "x86_64", "rootfsType": "squashfs",
			"rootfsIsReadOnly": true, "kernel": {"path": %q}, "rootfs": {"path": "rootfs"}}`, n, kernel)
		if err := os.WriteFile(manifest, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Pull(t.Context(), "base:hosted", name); err != nil {
			t.Fatal(err)
		}
	}
	pull(1, "one")
	pull(2, "two")
	for _, name := range []string{"one", "two"} {
		b, err := s.Boot(t.Context(), name, image.BootOptions{})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := b.Release(); err != nil {
			t.Error(err)
		}
	}
	// Without names bundles go, one at a time.
	if _, err := s.Tag(t.Context(), "two", "one"); err != nil {
		t.Fatal(err)
	}
	pull(3, "three")
	if got := tree(t, filepath.Join(work, "bundles")); cmp.Diff([]string{".index", ".lock", ".work", "mine-2", "mine-3"},
		got) != "" {
		t.Errorf("there are %v", got)
	}
	if err := os.RemoveAll(filepath.Join(work, "bundles", "mine-3")); err != nil {
		t.Fatal(err)
	}
	in, err := s.Inspect("three")
	if err != nil || cmp.Diff([]string{"mine-3"}, in.Missing) != "" {
		t.Errorf("%+v, %v", in, err)
	}
	if i, err := s.Restore(t.Context(), &in.Image); err != nil || i.Name != "three" {
		t.Errorf("%+v, %v", i, err)
	}
	if in, err = s.Inspect("three"); err != nil || len(in.Missing) > 0 {
		t.Errorf("%+v, %v", in, err)
	}
}
