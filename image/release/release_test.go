package release_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image/release"
	"push.rocks/smartvm/internal/download"
)

const arch = "x86_64"

// member of an archive.
type member struct {
	name string
	kind byte // 0: a regular file
	data string
	size int64 // 0: that of data
	link string
}

func archive(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Typeflag: m.kind, Size: int64(len(m.data)), Linkname: m.link, Mode: 0o4755, Uid: 1000}
		if m.kind == 0 {
			h.Typeflag = tar.TypeReg
		}
		if m.size > 0 {
			h.Size = m.size
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(m.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Flush(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func dir(version string) string { return "release-" + version + "-" + arch }

func program(version, name string) member {
	return member{name: dir(version) + "/" + name + "-" + version + "-" + arch, data: name + " " + version}
}

// whole is an archive as the project makes them.
func whole(t testing.TB, version string) []byte {
	return archive(t,
		member{name: dir(version) + "/", kind: tar.TypeDir},
		member{name: dir(version) + "/LICENSE", data: "text"},
		member{name: dir(version) + "/firecracker-" + version + "-" + arch + ".debug", data: "symbols"},
		program(version, "firecracker"), program(version, "seccompiler-bin"), program(version, "jailer"),
		member{name: dir(version) + "/SHA256SUMS", data: "sums"},
	)
}

// server has the recorded shape of the project's releases: a redirect to the newest, and files that
// another host has.
type server struct {
	*httptest.Server
	mu       sync.Mutex
	newest   string
	files    map[string][]byte
	requests []string
	answer   func(w http.ResponseWriter, r *http.Request) (done bool)
}

func serve(t *testing.T, versions ...string) *server {
	s := &server{files: map[string][]byte{}}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.requests = append(s.requests, r.Method+" "+r.URL.Path+r.Header.Get("Range"))
		answer, files := s.answer, maps.Clone(s.files)
		s.mu.Unlock()
		asset, isAsset := strings.CutPrefix(r.URL.Path, "/assets/")
		switch {
		case answer != nil && answer(w, r):
		case r.URL.Path == "/releases/latest":
			http.Redirect(w, r, "/releases/tag/"+s.newest, http.StatusFound)
		case strings.HasPrefix(r.URL.Path, "/releases/tag/"):
			fmt.Fprint(w, "<!DOCTYPE html>")
		case isAsset && files[asset] != nil:
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(files[asset]))
		case files[strings.TrimPrefix(r.URL.Path, "/releases/download/")] != nil:
			http.Redirect(w, r, "/assets/"+strings.TrimPrefix(r.URL.Path, "/releases/download/")+"?sig=secret", http.StatusFound)
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(s.Close)
	for _, v := range versions {
		s.newest = v
		s.put(v, whole(t, v))
	}
	return s
}

func name(version string) string { return "firecracker-" + version + "-" + arch + ".tgz" }

func (s *server) put(version string, data []byte) {
	sum := sha256.Sum256(data)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[version+"/"+name(version)] = data
	s.files[version+"/"+name(version)+".sha256.txt"] = []byte(hex.EncodeToString(sum[:]) + "  " + name(version) + "\n")
}

func (s *server) wantRequests(t *testing.T, want ...string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if diff := cmp.Diff(want, s.requests); diff != "" {
		t.Errorf("requests, -want +got:\n%s", diff)
	}
	s.requests = nil
}

func quick(o release.Options) release.Options {
	return release.WithClient(o,
		&download.Client{Transport: download.Transport{Pause: func(context.Context, time.Duration) error {
			return nil
		}}})
}

func open(t *testing.T, s *server) (*release.Store, string) {
	t.Helper()
	d := filepath.Join(t.TempDir(), "bin")
	store, err := release.Open(quick(release.Options{Dir: d, URL: s.URL + "/releases/", Arch: arch}))
	if err != nil {
		t.Fatal(err)
	}
	return store, d
}

// tree lists all files below a directory with their modes.
func tree(t *testing.T, root string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		fi, err := d.Info()
		all = append(all, strings.TrimPrefix(path, root+"/")+" "+fi.Mode().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func installed(version string) []string {
	return []string{
		version + " drwxr-xr-x", version + "/firecracker -rwxr-xr-x", version + "/jailer -rwxr-xr-x",
		version + "/release.json -rw-------",
	}
}

func wantTree(t *testing.T, root string, versions ...string) {
	t.Helper()
	want := []string{".work drwx------"}
	for _, v := range versions {
		want = append(want, installed(v)...)
	}
	if diff := cmp.Diff(want, tree(t, root)); diff != "" {
		t.Errorf("files, -want +got:\n%s", diff)
	}
}

func TestInstall(t *testing.T) {
	s := serve(t, "v1.7.0", "v1.16.1")
	store, d := open(t, s)
	b, err := store.Install(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	sum := func(text string) string { h := sha256.Sum256([]byte(text)); return hex.EncodeToString(h[:]) }
	want := release.Binary{
		Version: "v1.16.1", Firecracker: filepath.Join(d, "v1.16.1/firecracker"), Jailer: filepath.Join(d, "v1.16.1/jailer"),
		FirecrackerSHA256: sum("firecracker v1.16.1"), JailerSHA256: sum("jailer v1.16.1"),
		Source: s.URL + "/releases/download/v1.16.1/firecracker-v1.16.1-x86_64.tgz",
	}
	if diff := cmp.Diff(want, b); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for path, want := range map[string]string{b.Firecracker: "firecracker v1.16.1", b.Jailer: "jailer v1.16.1"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
	wantTree(t, d, "v1.16.1")
	s.wantRequests(t, "HEAD /releases/latest", "HEAD /releases/tag/v1.16.1",
		"GET /releases/download/v1.16.1/firecracker-v1.16.1-x86_64.tgz.sha256.txt",
		"GET /assets/v1.16.1/firecracker-v1.16.1-x86_64.tgz.sha256.txt",
		"GET /releases/download/v1.16.1/firecracker-v1.16.1-x86_64.tgz", "GET /assets/v1.16.1/firecracker-v1.16.1-x86_64.tgz")

	// Versions stand side by side; one that is there needs no network.
	if _, err := store.Ensure(t.Context(), "1.7.0"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	for _, again := range []func(context.Context, string) (release.Binary, error){store.Ensure, store.Install} {
		if b, err := again(t.Context(), "1.7.0"); err != nil || b.Version != "v1.7.0" {
			t.Errorf("%+v, %v", b, err)
		}
	}
	wantTree(t, d, "v1.16.1", "v1.7.0")
}

func TestListFindRemove(t *testing.T) {
	versions := []string{"v1.9.1", "v1.10.0", "v1.9.0", "v1.10.11", "v1.10.2"}
	s := serve(t, versions...)
	store, d := open(t, s)
	if _, err := store.Find(""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("find in nothing: %v", err)
	}
	for _, v := range versions {
		if _, err := store.Install(t.Context(), v); err != nil {
			t.Fatal(err)
		}
	}
	// None of these is one.
	err := errors.Join(os.Mkdir(filepath.Join(d, "v1.99.0"), 0o755), os.Mkdir(filepath.Join(d, "1.99.1"), 0o755),
		os.Mkdir(filepath.Join(d, "v1.99.2"), 0o755), os.Symlink("/bin/true", filepath.Join(d, "v1.99.2/firecracker")))
	if err != nil {
		t.Fatal(err)
	}
	all, err := store.List()
	var got []string
	for _, b := range all {
		got = append(got, b.Version)
	}
	if diff := cmp.Diff([]string{"v1.10.11", "v1.10.2", "v1.10.0", "v1.9.1", "v1.9.0"}, got); err != nil || diff != "" {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
	for asked, want := range map[string]string{"": "v1.10.11", "v1.9.0": "v1.9.0", "1.9.0": "v1.9.0"} {
		if b, err := store.Find(asked); err != nil || b.Version != want {
			t.Errorf("find %q: %+v, %v", asked, b, err)
		}
	}
	for _, asked := range []string{"v1.9.2", "v1.99.0", "v1.99.2"} {
		if _, err := store.Find(asked); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("find %s: %v", asked, err)
		}
	}
	if err := store.Remove("1.9.0"); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := store.Remove("v1.9.0"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("remove what is gone: %v", err)
		}
	}
	if got := tree(t, filepath.Join(d, ".work")); len(got) > 0 {
		t.Errorf("left behind: %v", got)
	}
}

func TestVersions(t *testing.T) {
	s := serve(t)
	store, _ := open(t, s)
	for _, version := range []string{
		"1", "1.2", "v1.2.3.4", "v1.2.3-rc1", "..", "v1.2.3/../..", "v01.2.3", "V1.2.3", "vv1.2.3", " v1.2.3", "v1.2.3\n",
		"latest", "v1.2.99999999", "v1..3",
	} {
		_, installErr := store.Install(t.Context(), version)
		_, ensureErr := store.Ensure(t.Context(), version)
		_, findErr := store.Find(version)
		for _, err := range []error{installErr, ensureErr, findErr, store.Remove(version)} {
			if !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("%q: %v", version, err)
			}
		}
	}
	s.wantRequests(t)
}

func TestOpen_Invalid(t *testing.T) {
	d := t.TempDir()
	if _, err := release.Open(release.Options{Dir: filepath.Join(d, "a"), Arch: "amd64"}); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("%v", err)
	}
	if err := os.Symlink(d, filepath.Join(d, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := release.Open(release.Options{Dir: filepath.Join(d, "link")}); err == nil {
		t.Error("a directory that is a link was taken")
	}
}

func TestOffline(t *testing.T) {
	s := serve(t, "v1.12.1")
	store, d := open(t, s)
	if _, err := store.Install(t.Context(), "v1.12.1"); err != nil {
		t.Fatal(err)
	}
	s.wantRequests(t, s.requests...)
	store, err := release.Open(release.Options{Dir: d, URL: s.URL + "/releases", Arch: arch, Offline: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Ensure(t.Context(), "v1.12.1"); err != nil {
		t.Error(err)
	}
	for _, version := range []string{"", "v1.12.0"} {
		if _, err := store.Ensure(t.Context(), version); !errors.Is(err, release.ErrOffline) {
			t.Errorf("%q: %v, want ErrOffline", version, err)
		}
	}
	s.wantRequests(t)
}

func TestLatest_Nonsense(t *testing.T) {
	s := serve(t)
	store, _ := open(t, s)
	for _, newest := range []string{"v1.2.3-rc1", "nightly", "..", "v1.2"} {
		s.newest = newest
		if v, err := store.Latest(t.Context()); err == nil {
			t.Errorf("%s was taken for %s", newest, v)
		}
	}
}

// What was damaged is installed anew; what somebody else has put there is looked at as it is.
func TestInstall_Repairs(t *testing.T) {
	s := serve(t, "v1.12.1")
	store, d := open(t, s)
	b, err := store.Install(t.Context(), "v1.12.1")
	if err != nil {
		t.Fatal(err)
	}
	for _, damage := range []func() error{
		func() error { return os.WriteFile(b.Firecracker, []byte("x"), 0o755) },
		func() error { return os.Remove(b.Jailer) },
		func() error { return os.Remove(filepath.Join(d, "v1.12.1/release.json")) },
		func() error { return os.WriteFile(filepath.Join(d, "v1.12.1/release.json"), []byte("{"), 0o600) },
		func() error { return os.RemoveAll(filepath.Join(d, "v1.12.1")) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if got, err := store.Install(t.Context(), "v1.12.1"); err != nil || got != b {
			t.Errorf("%+v, %v", got, err)
		}
		wantTree(t, d, "v1.12.1")
	}
	if err := os.Remove(filepath.Join(d, "v1.12.1/release.json")); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if got, err := store.Ensure(t.Context(), "v1.12.1"); err != nil || got.Firecracker != b.Firecracker ||
		got.FirecrackerSHA256 != "" {
		t.Errorf("%+v, %v", got, err)
	}
}
