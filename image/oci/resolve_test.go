package oci_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/image/oci/ocitest"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

var wantConfig = oci.Config{
	Entrypoint: []string{"/bin/init"}, Cmd: []string{"--quiet"}, Env: []string{"PATH=/bin"},
	User: "1:2", WorkingDir: "/srv", StopSignal: "SIGINT", ExposedPorts: []string{"53/udp", "80/tcp", "443/tcp"},
	Volumes: []string{"/data", "/srv/db", "/y"},
	Healthcheck: &oci.Healthcheck{
		Test: []string{"CMD", "/bin/check"}, Interval: 30 * time.Second, Timeout: time.Second, StartPeriod: 5 * time.Second,
		StartInterval: time.Second / 2, Retries: 3,
	},
}

func TestResolve_Registry(t *testing.T) {
	dir := t.TempDir()
	d := add(t, dir, "1", files("a"), files("b"))
	s := serve(t, dir, nil)
	i := resolve(t, s.host()+"/x/y:1", oci.Options{})
	if i.Name != s.host()+"/x/y:1" || i.Digest != d.Digest || len(i.Layers) != 2 ||
		i.Size != i.Layers[0].Size+i.Layers[1].Size {
		t.Errorf("%+v", i)
	}
	if diff := cmp.Diff(wantConfig, i.Config); diff != "" {
		t.Error(diff)
	}
	if got := s.blobs(); len(got) != 1 {
		t.Errorf("it asked for more than the configuration: %q", got)
	}
	again := resolve(t, s.host()+"/x/y@"+d.Digest, oci.Options{})
	if again.Chain != i.Chain || len(i.Chain) != 64 {
		t.Errorf("chain %s, want %s", again.Chain, i.Chain)
	}
	for ref, want := range map[string]error{
		s.host() + "/x/y:2": oci.ErrNotFound,
		s.host() + "/x/y@sha256:" + strings.Repeat("0", 64): oci.ErrNotFound,
		"192.168.255.254/x": oci.ErrPlainHTTP,
	} {
		o := oci.Options{}
		if errors.Is(want, oci.ErrPlainHTTP) {
			o.Transport = refuse{} // TLS is refused: what is left is plain HTTP
		}
		if _, err := oci.Resolve(t.Context(), ref, o); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", ref, err, want)
		}
	}
}

// refuse is a network that nobody answers in.
type refuse struct{}

func (refuse) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" {
		return nil, errors.New("plain HTTP was let through")
	}
	return nil, errors.New("refused")
}

// Docker Hub's images have short names, and are looked for in mirrors first.
func TestResolve_Mirrors(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "12", files("a"))
	s := serve(t, dir, nil)
	empty := serve(t, t.TempDir(), nil)
	hub := &hub{s: s}
	i := resolve(t, "debian:12", oci.Options{Transport: hub, Mirrors: []string{empty.host(), s.host()}})
	if i.Name != "debian:12" {
		t.Errorf("name %q", i.Name)
	}
	pull(t, i, t.TempDir())
	if hub.asked.Load() {
		t.Error("Docker Hub was asked, though the mirror has it")
	}
	if got := s.blobs(); len(got) != 2 || !strings.Contains(got[0], "/v2/library/debian/blobs/") {
		t.Errorf("the mirror was asked %q", got)
	}
	i = resolve(t, name.DefaultRegistry+"/library/debian:12",
		oci.Options{Transport: hub, Mirrors: []string{empty.host(), "bad host"}})
	if i.Name != "debian:12" || !hub.asked.Load() {
		t.Errorf("%q, and Docker Hub asked: %v", i.Name, hub.asked.Load())
	}
}

// hub sends what is meant for Docker Hub to a server.
type hub struct {
	s     *server
	base  http.RoundTripper // nil: http.DefaultTransport
	asked atomic.Bool
}

func (h *hub) RoundTrip(r *http.Request) (*http.Response, error) {
	to := r
	if r.URL.Host == name.DefaultRegistry {
		h.asked.Store(true)
		to = r.Clone(r.Context())
		to.URL.Scheme, to.URL.Host = "http", h.s.host()
	}
	base := h.base
	if base == nil {
		base = http.DefaultTransport
	}
	resp, err := base.RoundTrip(to)
	if resp != nil {
		resp.Request = r
	}
	return resp, err
}

func TestResolve_Platforms(t *testing.T) {
	dir := t.TempDir()
	var images []ocitest.Descriptor
	for _, arch := range []string{"arm64", "amd64"} {
		d, err := ocitest.Add(dir, arch, files(arch))
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, d)
	}
	attestation := images[0]
	attestation.Platform = map[string]string{"os": "unknown", "architecture": "unknown"}
	index, err := ocitest.AddIndex(dir, append([]ocitest.Descriptor{attestation}, images...)...)
	if err == nil {
		err = errors.Join(ocitest.Tag(dir, "all", index), ocitest.Tag(dir, "arm", images[0]))
	}
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, dir, nil)
	for n, arch := range []string{"arm64", "amd64"} {
		for _, ref := range []string{s.host() + "/a:all", "oci:" + dir + ":all"} {
			if i := resolve(t, ref, oci.Options{Arch: arch}); i.Digest != images[n].Digest {
				t.Errorf("%s for %s: %s, want %s", ref, arch, i.Digest, images[n].Digest)
			}
		}
	}
	for ref, want := range map[string]*manifest.PlatformError{
		s.host() + "/a:all": {Want: "linux/riscv64", Have: []string{"linux/arm64", "linux/amd64"}},
		s.host() + "/a:arm": {Want: "linux/riscv64", Have: []string{"linux/arm64"}},
	} {
		_, err := oci.Resolve(t.Context(), ref, oci.Options{Arch: "riscv64"})
		var got *manifest.PlatformError
		if !errors.As(err, &got) || !cmp.Equal(got, want) {
			t.Errorf("%s: %v, want %v", ref, err, want)
		}
	}
}

// A registry that wants a token, for which it wants a password.
func TestResolve_Auth(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a"))
	var s *server
	s = serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" {
				w.WriteHeader(http.StatusUnauthorized)
			}
			fmt.Fprint(w, `{"token":"t0"}`)
			return true
		}
		if r.Header.Get("Authorization") == "Bearer t0" {
			return false
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="s"`, s.URL))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	pull(t, resolve(t, s.host()+"/a:1", oci.Options{Keychain: keychain{}}), t.TempDir())
	var status *transport.Error
	if _, err := oci.Resolve(t.Context(), s.host()+"/a:1", oci.Options{}); !errors.As(err, &status) ||
		status.StatusCode != http.StatusUnauthorized {
		t.Errorf("%v, want status 401", err)
	}
}

// An identity token, of docker login in a browser or of a helper, is changed for one that the
// registry takes; where a blob's redirect leads, nobody is told it.
func TestResolve_IdentityToken(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a"))
	store := serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
		if got := r.Header.Get("Authorization"); got != "" {
			t.Errorf("where a redirect leads, %q is known", got)
		}
		return false
	})
	var s *server
	s = serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case r.URL.Path == "/token":
			if r.Method != http.MethodPost || r.FormValue("grant_type") != "refresh_token" ||
				r.FormValue("refresh_token") != "identity" {
				w.WriteHeader(http.StatusUnauthorized)
			}
			fmt.Fprint(w, `{"access_token":"t0"}`)
		case r.Header.Get("Authorization") != "Bearer t0":
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="s"`, s.URL))
			w.WriteHeader(http.StatusUnauthorized)
		case strings.Contains(r.URL.Path, "/blobs/"):
			http.Redirect(w, r, store.URL+r.URL.Path, http.StatusTemporaryRedirect)
		default:
			return false
		}
		return true
	})
	pull(t, resolve(t, s.host()+"/a:1", oci.Options{Keychain: identity{}}), t.TempDir())
	if got := store.blobs(); len(got) != 2 {
		t.Errorf("the redirects led to %q", got)
	}
}

type identity struct{}

func (identity) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(authn.AuthConfig{IdentityToken: "identity"}), nil
}

// What TLS has protected as far as a registry does not come in plain text from another machine.
func TestResolve_RedirectToPlain(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a"))
	for to, want := range map[string]error{"https://store.test": nil, "http://store.test": oci.ErrPlainHTTP} {
		_, err := oci.Resolve(t.Context(), "registry.test/a:1",
			oci.Options{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
				return memory{http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Host == "registry.test" && strings.Contains(r.URL.Path, "/blobs/") {
						http.Redirect(w, r, to+r.URL.Path, http.StatusTemporaryRedirect)
					} else {
						ocitest.Registry(dir).ServeHTTP(w, r)
					}
				})}.RoundTrip(r)
			})})
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", to, err, want)
		}
	}
}

type keychain struct{}

func (keychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return &authn.Basic{Username: "me", Password: "secret"}, nil
}

func TestResolve_BadAnswers(t *testing.T) {
	zeros := "sha256:" + strings.Repeat("0", 64)
	config := `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["` + zeros + `"]}}`
	configDigest := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(config)))
	answer := func(manifest string) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			text, ok := config, strings.HasSuffix(r.URL.Path, "/blobs/"+configDigest)
			if strings.Contains(r.URL.Path, "/manifests/") {
				text, ok = manifest, true
			}
			if ok {
				fmt.Fprint(w, text)
			}
			return ok
		}
	}
	one := func(size string) string {
		return `{"config":{"digest":"` + configDigest + `"},"layers":[{"digest":"` + zeros + `","size":` + size + `}]}`
	}
	for name, c := range map[string]struct{ text, want string }{
		"nothing":              {"", "read manifest: EOF"},
		"no JSON":              {"<html>", "read manifest: invalid character"},
		"too much":             {strings.Repeat(" ", 5<<20) + "{}", "more than 4194304 bytes"},
		"no configuration":     {`{"layers":[]}`, `digest "" is not a SHA-256`},
		"a digest with a path": {`{"config":{"digest":"sha256:../../../etc/passwd"}}`, "is not a SHA-256"},
		"another algorithm":    {`{"config":{"digest":"md5:00000000000000000000000000000000"}}`, "is not a SHA-256"},
		"an index of nothing":  {`{"manifests":[]}`, "there are: none"},
		"an index of bad ones": {`{"manifests":[{"digest":"x"}]}`, `digest "x" is not a SHA-256`},
		"an index of itself":   {`{"manifests":[{"digest":"` + zeros + `"}]}`, "manifest " + zeros + ": has digest"},
		"a size below 0":       {one("-1"), "a layer of -1 bytes"},
		"a size of 1":          {one("1"), ""},
		"a thousand layers": {
			`{"config":{"digest":"` + zeros + `"},"layers":[{}` + strings.Repeat(",{}", 999) + `]}`,
			"more than 512 layers",
		},
		"a configuration of none": {`{"config":{"digest":"` + zeros + `"}}`, "no such image"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, t.TempDir(), answer(c.text))
			i, err := oci.Resolve(t.Context(), s.host()+"/a", oci.Options{})
			if c.want == "" && err == nil {
				return // the control: what is wrong with the others is what they are about
			}
			if err == nil || c.want == "" || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%+v, %v, want %q", i, err, c.want)
			}
		})
	}
	t.Run("another manifest than was asked for", func(t *testing.T) {
		s := serve(t, t.TempDir(), answer("{}"))
		var wrong *flatten.DigestError
		if _, err := oci.Resolve(t.Context(), s.host()+"/a@"+zeros, oci.Options{}); !errors.As(err, &wrong) {
			t.Errorf("%v, want a DigestError", err)
		}
	})
	t.Run("redirects without end", func(t *testing.T) {
		s := serve(t, t.TempDir(), func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/v2/" {
				http.Redirect(w, r, r.URL.Path, http.StatusFound)
			}
			return r.URL.Path != "/v2/"
		})
		if _, err := oci.Resolve(t.Context(), s.host()+"/a", oci.Options{}); err == nil || len(s.asked) > 20 {
			t.Errorf("%v after %d requests", err, len(s.asked))
		}
	})
}

// What other tools write is read, and what we write is read by others.
func TestResolve_Archives(t *testing.T) {
	dir := t.TempDir()
	d := add(t, dir, "1", files("a"), files("b"))
	want := resolve(t, "oci:"+dir, oci.Options{})
	if want.Digest != d.Digest || want.Name != filepath.Base(dir)+":1" {
		t.Errorf("%+v", want)
	}
	tmp := t.TempDir()
	at := func(n string) string { return filepath.Join(tmp, n) }
	run(t, "tar", "-C", dir, "-cf", at("oci.tar"), ".")
	run(t, "gzip", "-k", at("oci.tar"))
	check := func(ref string, o oci.Options) {
		t.Helper()
		i := resolve(t, ref, o)
		if i.Chain != want.Chain || !cmp.Equal(i.Config, want.Config) {
			t.Errorf("%s: %+v", ref, i)
		}
		layers := t.TempDir()
		pull(t, i, layers)
		if got := have(t, layers); len(got) > 0 {
			t.Errorf("%s: layers were copied: %q", ref, got)
		}
	}
	check("oci:"+dir+":1", oci.Options{})
	check("docker-archive:"+at("oci.tar"), oci.Options{})
	check("docker-archive:"+at("oci.tar.gz")+":1", oci.Options{TempDir: tmp})
	for _, n := range []string{"oci.tar", "oci.tar.gz"} {
		text, err := os.ReadFile(at(n))
		if err != nil {
			t.Fatal(err)
		}
		check("-", oci.Options{Stdin: bytes.NewReader(text), TempDir: tmp})
	}
	if diff := cmp.Diff([]string{"oci.tar", "oci.tar.gz"}, have(t, tmp)); diff != "" {
		t.Errorf("left behind: %s", diff)
	}
}

// An archive as docker save writes it, and what is made of that, is the same image.
func TestResolve_Skopeo(t *testing.T) {
	skopeo := testenv.Fixture(t, fixtures.Skopeo)
	dir, tmp := t.TempDir(), t.TempDir()
	add(t, dir, "1", files("a"), files("b"), files("a"))
	want := resolve(t, "oci:"+dir, oci.Options{})
	archive, layout := filepath.Join(tmp, "docker.tar"), filepath.Join(tmp, "layout")
	run(t, skopeo, "copy", "--insecure-policy", "oci:"+dir+":1", "docker-archive:"+archive+":some/name:2")
	run(t, skopeo, "copy", "--insecure-policy", "docker-archive:"+archive, "oci:"+layout+":3")
	for ref, name := range map[string]string{
		"docker-archive:" + archive: "some/name:2", "docker-archive:" + archive + ":some/name:2": "some/name:2",
		"oci:" + layout: "layout:3",
	} {
		config := want.Config
		if strings.HasPrefix(ref, "oci:") {
			config.Healthcheck = nil // skopeo leaves it out, for OCI knows none
		}
		i := resolve(t, ref, oci.Options{})
		if i.Name != name || i.Chain != want.Chain || !cmp.Equal(i.Config, config) {
			t.Errorf("%s: %+v", ref, i)
		}
		layers := t.TempDir()
		pull(t, i, layers)
		if got := have(t, layers); len(got) > 0 {
			t.Errorf("%s: layers were copied: %q", ref, got)
		}
	}
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

func TestResolve_NoSuchArchive(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a"))
	add(t, dir, "2", files("b"))
	none := filepath.Join(t.TempDir(), "none.tar")
	if err := os.WriteFile(none, make([]byte, 1024), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{
		"oci:" + dir + ":3", "oci:/nonexistent", "docker-archive:/nonexistent:x",
		"docker-archive:" + none,
	} {
		if _, err := oci.Resolve(t.Context(), ref, oci.Options{}); !errors.Is(err, oci.ErrNotFound) {
			t.Errorf("%s: %v, want ErrNotFound", ref, err)
		}
	}
	if _, err := oci.Resolve(t.Context(), "oci:"+dir, oci.Options{}); err == nil ||
		!strings.Contains(err.Error(), ":1, ") {
		t.Errorf("%v, want a list of names", err)
	}
	for _, ref := range []string{"", ":", "-", "oci:", "docker-archive:", "UPPER", "a b", "a@sha256:0", "a:b:c"} {
		if _, err := oci.Resolve(t.Context(), ref, oci.Options{Transport: refuse{}}); err == nil {
			t.Errorf("%q is a reference", ref)
		}
	}
}

func FuzzResolve_Reference(f *testing.F) {
	for _, ref := range []string{
		"debian:12", "localhost:5000/a/b@sha256:" + strings.Repeat("0", 64), "oci:x:y",
		"docker-archive:x:y:z", "-", "[::1]:5/a",
	} {
		f.Add(ref)
	}
	f.Fuzz(func(t *testing.T, ref string) {
		if rest, ok := strings.CutPrefix(ref, "oci:"); ok {
			ref = "oci:/nonexistent/" + rest
		}
		if rest, ok := strings.CutPrefix(ref, "docker-archive:"); ok {
			ref = "docker-archive:/nonexistent/" + rest
		}
		if i, err := oci.Resolve(t.Context(), ref, oci.Options{Transport: refuse{}}); err == nil {
			t.Errorf("%q leads to %+v", ref, i)
		}
	})
}

func FuzzResolve_Archive(f *testing.F) {
	f.Add([]byte("\x1f\x8b"))
	f.Add(make([]byte, 1024))
	f.Fuzz(func(t *testing.T, data []byte) {
		if i, err := oci.Resolve(t.Context(), "-",
			oci.Options{Stdin: bytes.NewReader(data), TempDir: t.TempDir()}); err == nil {
			_ = i.Close()
		}
	})
}
