package image_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/oci/ocitest"
)

// files is a layer of files and their content.
func files(content map[string]string) ocitest.Layer {
	return func(w *tar.Writer) error {
		for _, name := range sorted(content) {
			h := &tar.Header{
				Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content[name])),
				ModTime: time.Unix(1_700_000_000, 0),
			}
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			if _, err := w.Write([]byte(content[name])); err != nil {
				return err
			}
		}
		return nil
	}
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// layoutOf makes an OCI layout of images by their tags.
func layoutOf(t testing.TB, images map[string][]ocitest.Layer) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	for _, tag := range sorted(images) {
		d, err := ocitest.Add(dir, "amd64", images[tag]...)
		if err == nil {
			err = ocitest.Tag(dir, tag, d)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// serve is a registry of a layout that says which requests there were, and where it is.
func serve(t testing.TB, dir string, before func(r *http.Request)) (host string) {
	t.Helper()
	h := ocitest.Registry(dir)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		before(r)
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

func isBlob(r *http.Request) bool { return strings.Contains(r.URL.Path, "/blobs/") }

// A data directory that was moved has other inodes: an image is verified once more, and a pull
// finds it is here.
func TestPull_Moved(t *testing.T) {
	layout := layoutOf(t, map[string][]ocitest.Layer{"1": {files(map[string]string{"etc/issue": "moved"})}})
	dir := storeDir(t)
	first, err := open(t, dir).Pull(t.Context(), "oci:"+layout, "app")
	if err != nil {
		t.Fatal(err)
	}
	moved := storeDir(t)
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", dir, moved).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s := open(t, moved, func(o *image.Options) {
		o.Waiting = func(what string) {
			t.Errorf("waits for %s, alone as it is", what)
			cancel()
		}
	})
	again, err := s.Pull(ctx, "oci:"+layout, "app")
	if err != nil || again.Root != first.Root {
		t.Fatalf("%+v, %v", again, err)
	}
	wantSound(t, s, moved)
}

// Who removes images waits for no pull, and takes nothing from it.
func TestRemove_WhilePulling(t *testing.T) {
	layout := layoutOf(t, map[string][]ocitest.Layer{
		"1": {files(map[string]string{"a": "a"}), files(map[string]string{"b": "b"})},
		"2": {files(map[string]string{"c": "c"})},
	})
	arrived, proceed := make(chan struct{}), make(chan struct{})
	var blobs atomic.Int64
	host := serve(t, layout, func(r *http.Request) {
		if isBlob(r) && blobs.Add(1) == 3 { // the configuration and a layer are there
			close(arrived)
			<-proceed
		}
	})
	dir := storeDir(t)
	s := open(t, dir)
	if _, err := s.Pull(t.Context(), "oci:"+layout+":2", "other"); err != nil {
		t.Fatal(err)
	}
	pulled := make(chan error)
	go func() {
		_, err := open(t, dir).Pull(t.Context(), host+"/app:1", "app")
		pulled <- err
	}()
	<-arrived
	remover := open(t, dir, func(o *image.Options) { o.Waiting = func(what string) { t.Errorf("waits for %s", what) } })
	if _, err := remover.Remove(t.Context(), "other", false); err != nil {
		t.Error(err)
	}
	if _, err := remover.Prune(t.Context(), image.PruneOptions{All: true, Layers: true}); err != nil {
		t.Error(err)
	}
	close(proceed)
	if err := <-pulled; err != nil {
		t.Error(err)
	}
	if n := blobs.Load(); n != 3 {
		t.Errorf("%d blobs were fetched: the pruning took layers from the pull", n)
	}
	if _, err := s.Find("app"); err != nil {
		t.Error(err)
	}
	wantSound(t, s, dir)
}

// readFunc is a reader.
type readFunc func(p []byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

// What is being made is no rubbish, and nobody waits for it.
func TestPrune_WhileImporting(t *testing.T) {
	var content bytes.Buffer
	w := tar.NewWriter(&content)
	if err := errors.Join(files(map[string]string{"etc/issue": "slow"})(w), w.Close()); err != nil {
		t.Fatal(err)
	}
	dir := storeDir(t)
	var once sync.Once
	stdin := readFunc(func(p []byte) (int, error) {
		once.Do(func() {
			s := open(t, dir, func(o *image.Options) { o.Waiting = func(what string) { t.Errorf("waits for %s", what) } })
			if _, err := s.Prune(t.Context(), image.PruneOptions{All: true}); err != nil {
				t.Error(err)
			}
		})
		return content.Read(p)
	})
	s := open(t, dir)
	if _, err := s.Import(t.Context(), image.ImportOptions{Name: "slow", Rootfs: "-", Stdin: stdin}); err != nil {
		t.Error(err)
	}
	wantSound(t, s, dir)
}

// Holders that follow each other without a gap do not keep out who waits to remove something.
func TestHold_RemoverFirst(t *testing.T) {
	dir := storeDir(t)
	s := open(t, dir)
	importTiny(t, s, "tiny")
	first, err := s.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	waits := make(chan string, 2)
	say := func(o *image.Options) { o.Waiting = func(what string) { waits <- what } }
	removed := make(chan error, 1)
	go func() {
		_, err := open(t, dir, say).Remove(t.Context(), "tiny", false)
		removed <- err
	}()
	<-waits
	second := make(chan error, 1)
	go func() {
		release, err := open(t, dir, say).Hold(t.Context())
		if err == nil {
			err = release()
		}
		second <- err
	}()
	select {
	case <-waits:
	case err := <-second:
		t.Errorf("another holds the store while it is waited for: %v", err)
		second <- nil
	}
	if err := first(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(<-removed, <-second); err != nil {
		t.Error(err)
	}
}

// Layers of what is here are not kept; those of a registry are, until they are asked to go.
func TestPull_Layers(t *testing.T) {
	layers := []ocitest.Layer{files(map[string]string{"a": "a"}), files(map[string]string{"b": "b"})}
	layout := layoutOf(t, map[string][]ocitest.Layer{"1": layers})
	host := serve(t, layout, func(*http.Request) {})
	dir := storeDir(t)
	s := open(t, dir)
	i, err := s.Pull(t.Context(), "oci:"+layout, "here")
	if err != nil || len(i.Layers) != 0 {
		t.Errorf("%+v, %v", i, err)
	}
	if got := tree(t, filepath.Join(dir, "layers")); len(got) > 0 {
		t.Errorf("kept of a layout: %v", got)
	}
	if _, err := s.Remove(t.Context(), "here", false); err != nil {
		t.Fatal(err)
	}
	if i, err = s.Pull(t.Context(), host+"/app:1", "app"); err != nil || len(i.Layers) != 2 {
		t.Errorf("%+v, %v", i, err)
	}
	for _, o := range []image.PruneOptions{{}, {Layers: true}} {
		if _, err := s.Prune(t.Context(), o); err != nil {
			t.Error(err)
		}
		if got, want := len(tree(t, filepath.Join(dir, "layers"))),
			map[bool]int{false: 2 + 2, true: 0}[o.Layers]; got != want {
			t.Errorf("%+v: %d layers and documents are there, want %d", o, got, want)
		}
	}
	wantSound(t, s, dir) // without its layers
}

// What an interrupted pull has fetched outlives rm, and goes with prune.
func TestRemove_Partial(t *testing.T) {
	dir := storeDir(t)
	s := open(t, dir)
	importTiny(t, s, "tiny")
	partial := filepath.Join(dir, "layers", "sha256-"+strings.Repeat("0", 64)+".partial")
	if err := os.WriteFile(partial, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(t.Context(), "tiny", false); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(partial); err != nil {
		t.Errorf("after rm: %v", err)
	}
	if _, err := s.Prune(t.Context(), image.PruneOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(partial); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after prune: %v", err)
	}
}

// A file that is both a tar and, as far as its magic number goes, an ext4 gives a layer and a root
// file system of one digest. What is pulled never stands in for what is imported.
func TestObjects_NameSpaces(t *testing.T) {
	body := make([]byte, 4096)
	copy(body[1024+0x38-512:], "\x53\xef")
	layer := files(map[string]string{"evil": string(body)})
	var both bytes.Buffer
	w := tar.NewWriter(&both)
	if err := errors.Join(layer(w), w.Close()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "audited.ext4")
	if err := os.WriteFile(path, both.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := storeDir(t)
	s := open(t, dir)
	evil, err := s.Pull(t.Context(), "oci:"+layoutOf(t, map[string][]ocitest.Layer{"1": {layer}}), "evil")
	if err != nil {
		t.Fatal(err)
	}
	audited, err := s.Import(t.Context(), image.ImportOptions{Name: "audited", Rootfs: path})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(evil.Root, "chain3-") || !strings.HasPrefix(audited.Root, "rootfs-") ||
		evil.Root == audited.Root {
		t.Errorf("pulled is %s, imported %s", evil.Root, audited.Root)
	}
	wantSound(t, s, dir)
}

// An object of before, when roots had one kind of id, boots; a pull of the same makes it anew.
func TestObjects_Before(t *testing.T) {
	layout := layoutOf(t, map[string][]ocitest.Layer{"1": {files(map[string]string{"etc/issue": "old"})}})
	dir := storeDir(t)
	s := open(t, dir)
	kernel, _ := sources(t)
	if _, err := s.Import(t.Context(), image.ImportOptions{Name: image.DefaultKernel, Kernel: kernel}); err != nil {
		t.Fatal(err)
	}
	i, err := s.Pull(t.Context(), "oci:"+layout, "app")
	if err != nil {
		t.Fatal(err)
	}
	_, digest, _ := strings.Cut(i.Root, "-")
	old := "root-" + digest
	rename(t, dir, i.Root, old)
	wantSound(t, s, dir)
	b, err := s.Boot(t.Context(), "app", image.BootOptions{})
	if err != nil || !strings.Contains(b.Root, old) {
		t.Fatalf("%+v, %v", b, err)
	}
	if err := b.Release(); err != nil {
		t.Fatal(err)
	}
	again, err := s.Pull(t.Context(), "oci:"+layout, "app")
	if err != nil || again.Root != i.Root {
		t.Errorf("%+v, %v, want root %s", again, err, i.Root)
	}
	wantSound(t, s, dir)
	if _, err := os.Stat(filepath.Join(dir, "objects", old)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old one is still there: %v", err)
	}
}

// rename gives an object another id, and all images that have it.
func rename(t *testing.T, dir, from, to string) {
	t.Helper()
	if err := os.Rename(filepath.Join(dir, "objects", from), filepath.Join(dir, "objects", to)); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "names", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(names, filepath.Join(dir, "objects", to, "object.json")) {
		text, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, bytes.ReplaceAll(text, []byte(from), []byte(to)), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// What is damaged is made anew by a pull or an import of the same, and VMs that use it stay its
// users.
func TestPull_Damaged(t *testing.T) {
	layout := layoutOf(t, map[string][]ocitest.Layer{"1": {files(map[string]string{"etc/issue": "sound"})}})
	_, rootfs := sources(t)
	for kind, make := range map[string]func(*image.Store) (*image.Image, error){
		"pull": func(s *image.Store) (*image.Image, error) { return s.Pull(t.Context(), "oci:"+layout, "app") },
		"import": func(s *image.Store) (*image.Image, error) {
			return s.Import(t.Context(), image.ImportOptions{Name: "app", Rootfs: rootfs})
		},
	} {
		for damage, do := range map[string]func(object string) error{
			"shorter":        func(object string) error { return os.Truncate(filepath.Join(object, "root.ext4"), 10) },
			"missing":        func(object string) error { return os.Remove(filepath.Join(object, "root.ext4")) },
			"no description": func(object string) error { return os.Remove(filepath.Join(object, "object.json")) },
			"rubbish": func(object string) error {
				return os.WriteFile(filepath.Join(object, "object.json"), []byte("{"), 0o600)
			},
		} {
			t.Run(kind+"/"+damage, func(t *testing.T) {
				dir := storeDir(t)
				s := open(t, dir)
				i, err := make(s)
				if err != nil {
					t.Fatal(err)
				}
				object, vm := filepath.Join(dir, "objects", i.Root), t.TempDir()
				if err := errors.Join(os.Symlink(vm, filepath.Join(object, "users", "vm")), do(object)); err != nil {
					t.Fatal(err)
				}
				if err := s.Verify(t.Context(), "app"); err == nil {
					t.Fatal("the damage is not seen")
				}
				if _, err := make(s); err != nil {
					t.Error(err)
				}
				wantSound(t, s, dir)
				if in, err := s.Inspect("app"); err != nil || cmp.Diff([]string{vm}, in.UsedBy) != "" {
					t.Errorf("%+v, %v, want it used by the VM", in, err)
				}
			})
		}
	}
}

// An image that shares nine layers of ten with one that is here moves one, and its configuration.
func TestPull_OneLayer(t *testing.T) {
	var layers []ocitest.Layer
	for n := range 11 {
		layers = append(layers, files(map[string]string{string(rune('a' + n)): "content"}))
	}
	layout := layoutOf(t,
		map[string][]ocitest.Layer{"1": layers[:10], "2": append(append([]ocitest.Layer{}, layers[:9]...), layers[10])})
	var mu sync.Mutex
	var moved []string
	host := serve(t, layout, func(r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if isBlob(r) {
			moved = append(moved, r.URL.Path)
		}
	})
	s := open(t, storeDir(t))
	for n, want := range []int{11, 2} {
		moved = nil
		if _, err := s.Pull(t.Context(), fmt.Sprintf("%s/app:%d", host, n+1), ""); err != nil {
			t.Fatal(err)
		}
		if len(moved) != want {
			t.Errorf("tag %d moved %v, want %d blobs", n+1, moved, want)
		}
	}
}

// What an image says of itself is kept with its name, and with a further one; a description of
// before, without, is read.
func TestInspect_About(t *testing.T) {
	r, dir := newRegistry(t), storeDir(t)
	img := randomImage(t, 1)
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.Author, c.Created.Time, c.Config.Labels = "me", time.Unix(1_700_000_000, 0), map[string]string{"a": "b"}
	c.Config.Volumes, c.History = map[string]struct{}{"/data": {}}, []v1.History{{CreatedBy: "COPY . /"}}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	if _, err := s.Pull(t.Context(), r.push(t, "app:1", img), "app"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Tag(t.Context(), "app", "other:1"); err != nil {
		t.Fatal(err)
	}
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"app", "other:1"} {
		in, err := open(t, dir).Inspect(name)
		if err != nil || in.ID != id.Hex || in.About.Author != "me" || !in.About.Built.Equal(c.Created.Time) ||
			in.About.Platform != "linux/amd64" ||
			len(in.About.History) != 1 || in.About.History[0].Size == 0 || in.Config.Labels["a"] != "b" ||
			len(in.Config.Volumes) != 1 {
			t.Errorf("%s: %+v, %v", name, in, err)
		}
	}
	before := filepath.Join(dir, "names", base64.RawURLEncoding.EncodeToString([]byte("old"))+".json")
	text := `{"version": 1, "name": "old", "created": "2026-01-01T00:00:00Z", "source": "import", "arch": "amd64", "root": "root-` + strings.Repeat("0", 64) + `"}`
	if err := os.WriteFile(before, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if in, err := s.Inspect("old"); err != nil || len(in.ID) != 64 || len(in.Missing) != 1 {
		t.Errorf("of before: %+v, %v", in, err)
	}
}

// A tag that has not changed costs one question, which registries do not count, as long as what it
// led to is here and complete.
func TestPull_Unchanged(t *testing.T) {
	layout := filepath.Join(t.TempDir(), "layout")
	tag := func(tag, content string) {
		t.Helper()
		d, err := ocitest.Add(layout, "amd64", files(map[string]string{"etc/issue": content}))
		if err == nil && tag == "index" {
			d, err = ocitest.AddIndex(layout, d)
		}
		if err == nil {
			err = ocitest.Tag(layout, tag, d)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	tag("1", "one")
	tag("index", "two")
	var mu sync.Mutex
	var asked []string
	host := serve(t, layout, func(r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.URL.Path != "/v2/" {
			asked = append(asked, r.Method+" "+r.URL.Path)
		}
	})
	dir := storeDir(t)
	pull := func(s *image.Store, ref, name string) (*image.Image, []string) {
		t.Helper()
		asked = nil
		i, err := s.Pull(t.Context(), ref, name)
		if err != nil {
			t.Fatal(err)
		}
		wantSound(t, s, dir)
		return i, asked
	}
	s := open(t, dir)
	for _, ref := range []string{host + "/app:1", "docker://" + host + "/app:index"} {
		head := []string{"HEAD /v2/app/manifests/" + ref[strings.LastIndex(ref, ":")+1:]}
		first, all := pull(s, ref, "")
		if len(all) < 3 {
			t.Errorf("%s: at first %q: want a manifest, a configuration and a layer", ref, all)
		}
		again, all := pull(open(t, dir), ref, "")
		if diff := cmp.Diff(head, all); diff != "" || again.ID != first.ID || again.Root != first.Root ||
			again.Name != first.Name || !again.Created.Equal(first.Created) {
			t.Errorf("%s: %s\n%+v, then %+v", ref, diff, first, again)
		}
		if named, all := pull(s, ref, "mine"); len(all) < 2 || named.Name != "mine" || named.Root != first.Root {
			t.Errorf("%s: another name: %+v, %q", ref, named, all)
		}
		if named, all := pull(s, ref, "mine"); cmp.Diff(head, all) != "" || named.Name != "mine" {
			t.Errorf("%s: again by another name: %+v, %q", ref, named, all)
		}
		// What is not complete is made again, whatever the registry says.
		if err := os.RemoveAll(filepath.Join(dir, "objects", first.Root)); err != nil {
			t.Fatal(err)
		}
		if again, all = pull(s, ref, ""); again.Root != first.Root || len(all) < 3 {
			t.Errorf("%s: without its object: %+v, %q", ref, again, all)
		}
	}
	before, err := s.Find(host + "/app:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(layout, "index.json")); err != nil {
		t.Fatal(err)
	}
	tag("1", "three")
	if i, _ := pull(s, host+"/app:1", ""); i.ID == before.ID || i.Replaced == nil {
		t.Errorf("a tag that leads elsewhere now: %+v", i)
	}
}
