package give_test

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/registry"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/give"
	"push.rocks/smartvm/image/login"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/ocitest"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/tinyguest"
)

func TestMain(m *testing.M) {
	testenv.OthersOut()
	m.Run()
}

func open(t testing.TB, change ...func(*image.Options)) *image.Store {
	t.Helper()
	o := image.Options{Dir: filepath.Join(t.TempDir(), "images"), Agent: []byte("#!agent"), Arch: "amd64"}
	for _, c := range change {
		c(&o)
	}
	s, err := image.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// layer is one with a few files, an opaque directory and a hard link.
func layer(n int) ocitest.Layer {
	return func(w *tar.Writer) error {
		at := time.Unix(1_700_000_000, 0)
		text := fmt.Sprintf("of layer %d\n", n)
		name := fmt.Sprintf("srv/file%d", n)
		for _, h := range []*tar.Header{
			{Typeflag: tar.TypeDir, Name: "srv/", Mode: 0o750, Uid: 5, Gid: 6, ModTime: at},
			{
				Typeflag: tar.TypeReg, Name: name, Mode: 0o4755, Size: int64(len(text)), ModTime: at,
				PAXRecords: map[string]string{"SCHILY.xattr.user.n": fmt.Sprint(n)},
			},
			{Typeflag: tar.TypeLink, Name: name + "-link", Linkname: name, ModTime: at},
			{Typeflag: tar.TypeSymlink, Name: name + "-symlink", Linkname: name, Mode: 0o777, ModTime: at},
		} {
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			if h.Typeflag == tar.TypeReg {
				if _, err := io.WriteString(w, text); err != nil {
					return err
				}
			}
		}
		return nil
	}
}

// service is a registry, in this process, that counts what is sent and asked of it.
type service struct {
	host string

	mu       sync.Mutex
	requests []string // method and path, with the query of a mount
	hidden   string   // a repository that is said to have no blobs: the real one has them all in one place
	told     []string // users that said who they are
	password string   // that user "me" must have to push and pull; "": none
}

func (s *service) seen(part string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.requests {
		if strings.Contains(r, part) {
			n++
		}
	}
	return n
}

func (s *service) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = nil
}

func serve(t testing.TB, password string) *service {
	t.Helper()
	s := &service{password: password}
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, pass, _ := r.BasicAuth(); s.password != "" && (user != "me" || pass != s.password) {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		s.mu.Lock()
		if user, _, ok := r.BasicAuth(); ok {
			s.told = append(s.told, user)
		}
		s.requests = append(s.requests, r.Method+" "+r.URL.RequestURI())
		hidden := s.hidden != "" && r.Method == http.MethodHead && strings.HasPrefix(r.URL.Path, "/v2/"+s.hidden+"/blobs/")
		s.mu.Unlock()
		if hidden {
			http.NotFound(w, r)
			return
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	s.host = strings.TrimPrefix(server.URL, "http://")
	return s
}

// loggedIn has docker's configuration know a password.
func loggedIn(t testing.TB, host, password string) func(*image.Options) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	text := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte("me:"+password)))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return func(o *image.Options) { o.OCI.Keychain = &login.Keychain{Files: []string{path}} }
}

// layout makes an image of layers in an OCI layout, and returns its reference.
func layout(t testing.TB, layers int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	var all []ocitest.Layer
	for n := range layers {
		all = append(all, layer(n))
	}
	d, err := ocitest.Add(dir, "amd64", all...)
	if err == nil {
		err = ocitest.Tag(dir, "1", d)
	}
	if err != nil {
		t.Fatal(err)
	}
	return "oci:" + dir + ":1"
}

func pull(t testing.TB, s *image.Store, ref, name string) *image.Image {
	t.Helper()
	i, err := s.Pull(t.Context(), ref, name)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func save(t testing.TB, s *image.Store, ref string) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := give.Save(t.Context(), s, ref, &out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func put(t testing.TB, text []byte) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "saved.tar")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// same wants two images to be one, to the file system's bytes.
func same(t testing.TB, got, want *image.Image) {
	t.Helper()
	parts := func(i *image.Image) []string { return []string{i.ID, i.Digest, i.Root} }
	if diff := cmp.Diff(parts(want), parts(got)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(want.Config, got.Config); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(want.About, got.About); diff != "" {
		t.Error(diff)
	}
}

func hintOf(err error) string {
	var hinted interface{ Hint() string }
	if errors.As(err, &hinted) {
		return hinted.Hint()
	}
	return ""
}

// What was pulled is saved with the digests that it had, whether its layers are here, come again
// from a registry, or from a layout.
func TestSave(t *testing.T) {
	r := serve(t, "")
	from := open(t)
	ref := r.host + "/team/app:1"
	local := pull(t, from, layout(t, 3), "local")
	if _, err := give.Push(t.Context(), from, "local", ref); err != nil {
		t.Fatal(err)
	}
	s := open(t)
	want := pull(t, s, ref, "")
	if want.Digest != local.Digest || want.Root != local.Root {
		t.Errorf("%+v, want %+v", want, local)
	}
	r.forget()
	first := save(t, s, ref)
	if n := r.seen(""); n > 0 {
		t.Errorf("%d requests for what is here", n)
	}
	if !bytes.Equal(first, save(t, s, ref)) {
		t.Error("it is saved in another way the second time")
	}
	for _, scheme := range []string{"oci-archive:", "docker-archive:"} {
		got := pull(t, open(t), scheme+put(t, first), "")
		same(t, got, want)
		if got.Name != want.Name {
			t.Errorf("it is called %s, not %s", got.Name, want.Name)
		}
	}
	same(t, pull(t, open(t, func(o *image.Options) { o.OCI.Stdin = bytes.NewReader(first) }), "-", ""), want)
	if _, err := s.Prune(t.Context(), image.PruneOptions{Layers: true}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, save(t, s, ref)) || r.seen("GET ") == 0 {
		t.Error("layers that were removed do not come again")
	}
	same(t, pull(t, open(t), "oci-archive:"+put(t, save(t, from, "local")), ""), want)
	if in, err := s.Inspect(ref); err != nil || len(in.Missing) > 0 {
		t.Errorf("%+v, %v", in, err)
	}
}

// Others read what is saved.
func TestSave_Skopeo(t *testing.T) {
	tool := testenv.Fixture(t, fixtures.Skopeo)
	s := open(t)
	want := pull(t, s, layout(t, 2), "app:1")
	path := put(t, save(t, s, "app:1"))
	for _, scheme := range []string{"oci-archive:", "docker-archive:"} {
		to := filepath.Join(t.TempDir(), "copy")
		cmd := exec.CommandContext(t.Context(), tool, "--insecure-policy", "copy", "--preserve-digests",
			scheme+path, "oci:"+to)
		cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
		if out, err := cmd.CombinedOutput(); err != nil && scheme == "oci-archive:" {
			t.Errorf("%s: %v\n%s", scheme, err, out)
			continue
		} else if err != nil { // it makes a manifest of its own, as docker does
			cmd := exec.CommandContext(t.Context(), tool, "--insecure-policy", "copy", scheme+path, "oci:"+to)
			cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", scheme, err, out)
				continue
			}
		}
		got := pull(t, open(t), "oci:"+to, "copy")
		if got.Root != want.Root || scheme == "oci-archive:" && got.Digest != want.Digest {
			t.Errorf("%s: %+v, want %+v", scheme, got, want)
		}
	}
}

// An image that was imported is one layer, with all that its files and its configuration are.
func TestSave_Imported(t *testing.T) {
	from := open(t)
	base := pull(t, from, layout(t, 2), "layers")
	path, _, err := from.Root(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	s := open(t)
	line := `["/bin/app", "-v"]`
	want, err := s.Import(t.Context(),
		image.ImportOptions{
			Name: "mine", Rootfs: path,
			Runs: config.Change{Cmd: &line, Env: []string{"A=b"}, User: "5:6", WorkingDir: "/srv"},
		})
	if err != nil {
		t.Fatal(err)
	}
	first := save(t, s, "mine")
	if !bytes.Equal(first, save(t, s, "mine")) {
		t.Error("it is saved in another way the second time")
	}
	other := open(t)
	got := pull(t, other, "docker-archive:"+put(t, first), "")
	if got.Name != "mine:latest" || got.About.Platform != "linux/amd64" || len(got.About.History) != 1 {
		t.Errorf("%+v", got)
	}
	if diff := cmp.Diff(want.Config, got.Config); diff != "" {
		t.Error(diff)
	}
	// Saved as one layer again, both are the same tar.
	if diff := cmp.Diff(onlyLayer(t, first), onlyLayer(t, save(t, flat(t, other, got), "flat"))); diff != "" {
		t.Error(diff)
	}
}

// flat imports the root of an image into a store of its own.
func flat(t testing.TB, s *image.Store, i *image.Image) *image.Store {
	t.Helper()
	path, _, err := s.Root(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	other := open(t)
	if _, err := other.Import(t.Context(), image.ImportOptions{Name: "flat", Rootfs: path}); err != nil {
		t.Fatal(err)
	}
	return other
}

// onlyLayer is the name of an archive's largest blob: its digest.
func onlyLayer(t testing.TB, archive []byte) string {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg { // layers come first
			return h.Name
		}
	}
}

// A pulled image whose layers cannot be had any more is one layer.
func TestSave_Gone(t *testing.T) {
	s := open(t)
	from := layout(t, 2)
	want := pull(t, s, from, "app")
	if err := os.RemoveAll(strings.TrimSuffix(strings.TrimPrefix(from, "oci:"), ":1")); err != nil {
		t.Fatal(err)
	}
	got := pull(t, open(t), "oci-archive:"+put(t, save(t, s, "app")), "")
	if got.Digest == want.Digest || len(got.About.History) != len(want.About.History)+1 {
		t.Errorf("%+v", got)
	}
	if diff := cmp.Diff(want.Config, got.Config); diff != "" {
		t.Error(diff)
	}
}

func TestSave_Refused(t *testing.T) {
	r := serve(t, "")
	s := open(t)
	kernel := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(kernel, tinyguest.Image(tinyguest.Guest{Then: tinyguest.Idle}), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Import(t.Context(), image.ImportOptions{Name: "kernel", Kernel: kernel}); err != nil {
		t.Fatal(err)
	}
	pull(t, s, layout(t, 1), "local")
	if _, err := give.Push(t.Context(), s, "local", r.host+"/app"); err != nil {
		t.Fatal(err)
	}
	fresh := open(t)
	app := pull(t, fresh, r.host+"/app", "app")
	for name, want := range map[string]string{"nothing": "no such image", "kernel": "it has no root file system"} {
		var out bytes.Buffer
		if err := give.Save(t.Context(), s, name, &out); err == nil || !strings.Contains(err.Error(), want) || out.Len() > 0 {
			t.Errorf("save %s: %v, and %d bytes", name, err, out.Len())
		}
	}
	// A layer that is not what it was.
	w, err := fresh.Workshop(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(w.Layers, strings.Replace(app.Layers[0], ":", "-", 1))
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text[len(text)/2] ^= 1
	if err := errors.Join(os.WriteFile(path, text, 0o600), w.Close()); err != nil {
		t.Fatal(err)
	}
	if err := give.Save(t.Context(), fresh, "app", io.Discard); !errors.As(err, new(*flatten.DigestError)) {
		t.Errorf("a damaged layer: %v", err)
	}
}

// What is pushed pulls back equal, with docker's logins, and is sent once.
func TestPush(t *testing.T) {
	r := serve(t, "secret")
	s := open(t, loggedIn(t, r.host, "secret"))
	want := pull(t, s, layout(t, 3), "local")
	pushed, err := give.Push(t.Context(), s, "local", r.host+"/team/app:2")
	if err != nil {
		t.Fatal(err)
	}
	if pushed.Digest != want.Digest || pushed.Reference != r.host+"/team/app:2" {
		t.Errorf("%+v, want digest %s", pushed, want.Digest)
	}
	if n := r.seen("PATCH "); n != 4 { // layers and the configuration
		t.Errorf("%d blobs were sent", n)
	}
	got := pull(t, open(t, loggedIn(t, r.host, "secret")), r.host+"/team/app:2", "")
	same(t, got, want)
	r.forget()
	if _, err := give.Push(t.Context(), s, "local", r.host+"/team/app:3"); err != nil {
		t.Fatal(err)
	}
	if n := r.seen("PATCH ") + r.seen("POST "); n > 0 || r.seen("PUT ") != 1 {
		t.Errorf("what is there was sent again: %d", n)
	}
	for name, other := range map[string]*image.Store{
		"no login":  open(t),
		"another's": open(t, loggedIn(t, r.host, "wrong")),
	} {
		pull(t, other, layout(t, 1), "local")
		if _, err := give.Push(t.Context(), other, "local", r.host+"/team/app:4"); err == nil ||
			!strings.Contains(hintOf(err), "docker login "+r.host) || strings.Contains(err.Error(), "wrong") {
			t.Errorf("%s: %v, hint %q", name, err, hintOf(err))
		}
	}
	if n := r.seen("app/manifests/4"); n > 0 {
		t.Error("it was pushed without a login")
	}
}

// A login for this once is for where an image is sent, not for where its layers come from.
func TestPush_Login(t *testing.T) {
	from, to := serve(t, ""), serve(t, "secret")
	first := open(t)
	pull(t, first, layout(t, 1), "local")
	if _, err := give.Push(t.Context(), first, "local", from.host+"/app:1"); err != nil {
		t.Fatal(err)
	}
	s := open(t)
	want := pull(t, s, from.host+"/app:1", "")
	w, err := s.Workshop(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(w.Layers)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prune(t.Context(), image.PruneOptions{Layers: true}); err != nil {
		t.Fatal(err)
	}
	from.forget()
	once := open(t, func(o *image.Options) { o.Dir, o.OCI.Login = dir, &authn.Basic{Username: "me", Password: "secret"} })
	pushed, err := give.Push(t.Context(), once, want.Name, to.host+"/app:1")
	if err != nil || pushed.Digest != want.Digest {
		t.Fatalf("%+v, %v", pushed, err)
	}
	if from.seen("GET ") == 0 || len(from.told) > 0 || len(to.told) == 0 {
		t.Errorf("where layers came from was told %q, in %q; where they went %q", from.told, from.requests, to.told)
	}
}

// A registry that has the layers in the repository that the image came from takes them from there.
func TestPush_Mount(t *testing.T) {
	r := serve(t, "")
	from := open(t)
	pull(t, from, layout(t, 2), "local")
	if _, err := give.Push(t.Context(), from, "local", r.host+"/team/one:1"); err != nil {
		t.Fatal(err)
	}
	s := open(t)
	pull(t, s, r.host+"/team/one:1", "")
	r.forget()
	r.hidden = "other/two"
	if _, err := give.Push(t.Context(), s, r.host+"/team/one:1", r.host+"/other/two:1"); err != nil {
		t.Fatal(err)
	}
	if r.seen("from=team%2Fone") != 2 {
		t.Errorf("it was not asked to: %q", r.requests)
	}
}

func TestPush_Refused(t *testing.T) {
	s := open(t)
	pull(t, s, layout(t, 1), "local")
	for to, want := range map[string]string{
		"oci:somewhere": "it is no reference of a registry",
		"./file":        "it is no reference of a registry",
		"127.0.0.1:1/app@sha256:" + strings.Repeat("0", 64): "it has a digest",
		"127.0.0.1:1/APP": "could not parse reference",
		"127.0.0.1:1/app": "cannot be reached",
		"192.168.7.7/app": "plain HTTP",
	} {
		if _, err := give.Push(t.Context(), s, "local", to); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", to, err, want)
		}
	}
	offline := open(t, func(o *image.Options) { o.Offline = true })
	pull(t, offline, layout(t, 1), "local")
	if _, err := give.Push(t.Context(), offline, "local", "127.0.0.1:1/app"); !errors.Is(err, image.ErrOffline) {
		t.Errorf("offline: %v", err)
	}
}
