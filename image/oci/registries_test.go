package oci_test

import (
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/ocitest"
	"push.rocks/smartvm/image/registries"
)

// conf is a registries.conf.
func conf(t testing.TB, text string) func() (*registries.Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "registries.conf")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return func() (*registries.Config, error) { return registries.Read(path) }
}

// A registry with a certificate that nobody knows is asked where somebody has said so, or has given
// the authority's.
func TestResolve_Certificates(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a"))
	s := httptest.NewUnstartedServer(ocitest.Registry(dir))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "https://")
	ref := host + "/app:1"
	certs := func(text string) func() (*registries.Config, error) {
		root := t.TempDir()
		path := filepath.Join(root, host, "ca.crt")
		if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
		return func() (*registries.Config, error) {
			return &registries.Config{CertDirs: []string{"/nonexistent", root}}, nil
		}
	}
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	for name, o := range map[string]oci.Options{
		"insecure":     {Registries: conf(t, "[[registry]]\nlocation = \""+host+"\"\ninsecure = true\n")},
		"an authority": {Registries: certs(ca)},
	} {
		if i, err := oci.Resolve(t.Context(), ref, o); err != nil {
			t.Errorf("%s: %v", name, err)
		} else {
			pull(t, i, t.TempDir())
			if err := i.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	for name, c := range map[string]struct {
		o    oci.Options
		want string
	}{
		"nothing is known": {oci.Options{}, "signed by unknown authority"},
		"of another": {oci.Options{
			Registries: conf(t, "[[registry]]\nlocation = \"other.test\"\ninsecure = true\n"),
		}, "signed by unknown authority"},
		"no certificate": {oci.Options{Registries: certs("rubbish")}, "ca.crt holds none"},
		"blocked": {
			oci.Options{Registries: conf(t, "[[registry]]\nlocation = \""+host+"\"\nblocked = true\n")},
			"is blocked by",
		},
		"an unreadable config": {oci.Options{Registries: conf(t, "rubbish")}, "registries.conf"},
	} {
		if _, err := oci.Resolve(t.Context(), ref, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		} else if advice := adviceOf(err); strings.Contains(c.want, "authority") &&
			!strings.Contains(advice, host+"/ca.crt") {
			t.Errorf("%s: hint %q", name, advice)
		}
	}
}

// What is said of all registries counts for mirrors of Docker Hub as well.
func TestResolve_InsecureMirror(t *testing.T) {
	dir := t.TempDir()
	d := add(t, dir, "1", files("a"))
	s := httptest.NewUnstartedServer(ocitest.Registry(dir))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()
	hub := serve(t, t.TempDir(), nil)
	text := "[[registry]]\nprefix = \"docker.io\"\nlocation = \"" + hub.host() + "\"\n"
	for verify, want := range map[*bool]bool{nil: false, new(true): false, new(false): true} {
		o := oci.Options{
			Mirrors: []string{strings.TrimPrefix(s.URL, "https://")},
			Registries: func() (*registries.Config, error) {
				c, err := conf(t, text)()
				if err == nil {
					c.TLSVerify = verify
				}
				return c, err
			},
		}
		i, err := oci.Resolve(t.Context(), "app:1", o)
		if want && (err != nil || i.Digest != d.Digest) || !want && !errors.Is(err, oci.ErrNotFound) {
			t.Errorf("%v: %+v, %v", want, i, err)
		}
		if err == nil {
			_ = i.Close()
		}
	}
}

// Plain HTTP on another machine is for registries of which somebody has said so, and does not lead
// to this machine.
func TestResolve_Insecure(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a"))
	service := serve(t, dir, nil)
	var away bool
	s := serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
		if away && strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, service.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	far := roundTrip(func(r *http.Request) (*http.Response, error) {
		if r.URL.Scheme == "https" {
			return nil, errors.New("no TLS here")
		}
		to := r.Clone(r.Context())
		if r.URL.Host == "registry.test" {
			to.URL.Host = s.host()
		}
		resp, err := http.DefaultTransport.RoundTrip(to)
		if resp != nil {
			resp.Request = r
		}
		return resp, err
	})
	insecure := oci.Options{
		Transport:  far,
		Registries: conf(t, "[[registry]]\nlocation = \"registry.test\"\ninsecure = true\n"),
	}
	pull(t, resolve(t, "registry.test/app:1", insecure), t.TempDir())
	if _, err := oci.Resolve(t.Context(), "registry.test/app:1", oci.Options{Transport: far}); err == nil {
		t.Error("plain HTTP, though nobody has said so")
	}
	away = true
	if _, err := oci.Resolve(t.Context(), "registry.test/app:1", insecure); !errors.Is(err, oci.ErrPlainHTTP) ||
		len(service.blobs()) > 0 {
		t.Errorf("%v, and a service of this machine was asked", err)
	}
}

// A short name may stand for a place elsewhere, and stays what the image is called.
func TestResolve_Elsewhere(t *testing.T) {
	dir := t.TempDir()
	d := add(t, dir, "1", files("a"))
	s := serve(t, dir, nil)
	hub := &hub{s: serve(t, t.TempDir(), nil)}
	for ref, text := range map[string]string{
		"app:1":         "[[registry]]\nprefix = \"docker.io\"\nlocation = \"" + s.host() + "/hub\"\n",
		"tool:1":        "[aliases]\ntool = \"" + s.host() + "/team/tool\"\n",
		"debian:1":      "[[registry]]\nlocation = \"docker.io\"\n[[registry.mirror]]\nlocation = \"" + s.host() + "\"\n",
		"away.test/a:1": "[[registry]]\nprefix = \"*.test\"\nlocation = \"" + s.host() + "\"\n",
	} {
		i := resolve(t, ref, oci.Options{Transport: hub, Registries: conf(t, text)})
		if i.Name != ref || i.Digest != d.Digest || hub.asked.Load() {
			t.Errorf("%s: %s of %s, and Docker Hub asked: %v", ref, i.Name, i.Digest, hub.asked.Load())
		}
	}
}
