package oci_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/ocitest"
)

// A mirror that fails after it has given the manifest is left for the registry itself, whatever it
// does.
func TestFetch_MirrorFails(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", noise(50_000, 0), noise(50_000, 1), noise(50_000, 2))
	want := resolve(t, "oci:"+dir, oci.Options{})
	first := want.Layers[0].Digest
	for _, c := range []struct {
		name  string
		blob  string // that the mirror does not serve; empty: none
		with  func(w http.ResponseWriter, r *http.Request)
		asked bool // whether the registry itself is
	}{
		{name: "it does not", blob: "none", with: status(404)},
		{name: "a layer is missing", blob: first, with: status(404), asked: true},
		{name: "a layer is forbidden", blob: first, with: status(403), asked: true},
		{
			name: "a layer is another", blob: first, with: plain(bytes.Repeat([]byte("x"), int(want.Layers[0].Size))),
			asked: true,
		},
		{name: "a layer is too long", blob: first, with: plain(make([]byte, 1<<20)), asked: true},
		{name: "a layer is too short", blob: first, with: plain([]byte("x")), asked: true},
		{name: "a layer never comes whole", blob: first, with: early([]byte("x"), 1), asked: true},
		{name: "it is busy", blob: first, with: status(503), asked: true},
		{name: "all are missing", blob: "sha256:", with: status(404), asked: true},
	} {
		inBubble(t, c.name, func(t *testing.T) {
			n := newNetwork(t)
			mirror := n.serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/blobs/"+c.blob) {
					return false
				}
				c.with(w, r)
				return true
			})
			hub := &hub{s: n.serve(t, dir, nil), base: n.Transport}
			i := resolve(t, "app:1", oci.Options{Transport: hub, Mirrors: []string{mirror.host()}})
			layers := t.TempDir()
			if err := i.Fetch(t.Context(), layers, nil); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(layerFiles(want), have(t, layers)); diff != "" {
				t.Error(diff)
			}
			if got := len(hub.s.blobs()) > 0; got != c.asked {
				t.Errorf("Docker Hub was asked for blobs: %v, want %v", got, c.asked)
			}
		})
	}
}

// A mirror that gives half of a layer, right or wrong, is left for the registry itself, whether
// that has the layer or not.
func TestFetch_MirrorBreaksOff(t *testing.T) {
	dir, l, content, flipped := noiseLayer(t)
	const half = 100_000
	rest := fmt.Sprintf("GET /v2/library/app/blobs/%s bytes=%d-", l.Digest, half)
	for _, c := range []struct {
		name  string
		gives []byte
		lost  bool     // to the registry itself as well
		asked []string // of the registry itself
	}{
		{name: "right", gives: content, asked: []string{rest}},
		{name: "wrong", gives: flipped, asked: []string{rest, strings.TrimSuffix(rest, fmt.Sprintf(" bytes=%d-", half))}},
		{name: "lost", gives: content, asked: []string{rest}, lost: true},
	} {
		inBubble(t, c.name, func(t *testing.T) {
			n := newNetwork(t)
			mirror := n.serve(t, dir, answers(l.Digest, firstBytes(c.gives, half), status(404)))
			hub := &hub{base: n.Transport, s: n.serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
				if c.lost && blob(r, l.Digest) {
					http.NotFound(w, r)
					return true
				}
				return false
			})}
			i := resolve(t, "app:1", oci.Options{Transport: hub, Mirrors: []string{mirror.host()}})
			hub.s.blobs()
			layers := t.TempDir()
			err := i.Fetch(t.Context(), layers, nil)
			if c.lost != errors.Is(err, oci.ErrNotFound) || !c.lost && err != nil {
				t.Errorf("%v, lost: %v", err, c.lost)
			}
			if diff := cmp.Diff(c.asked, hub.s.blobs()); diff != "" {
				t.Errorf("requests, -want +got:\n%s", diff)
			}
			if want := layerFiles(i); !c.lost && !cmp.Equal(want, have(t, layers)) {
				t.Errorf("%q, want %q", have(t, layers), want)
			}
		})
	}
}

// A registry elsewhere does not have us ask services of this machine; one that is here may.
func TestFetch_Redirects(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", noise(1000, 0))
	service := serve(t, dir, nil)
	s := serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, service.URL+r.URL.Path, http.StatusTemporaryRedirect)
		}
		return strings.Contains(r.URL.Path, "/blobs/")
	})
	pull(t, resolve(t, s.host()+"/a:1", oci.Options{}), t.TempDir())
	if len(service.blobs()) == 0 {
		t.Error("a registry of this machine leads nowhere")
	}
	_, err := oci.Resolve(t.Context(), "app:1", oci.Options{Transport: &hub{s: s}})
	if got := service.blobs(); !errors.Is(err, oci.ErrPlainHTTP) || len(got) > 0 {
		t.Errorf("%v, and the service was asked %q", err, got)
	}
}

// Blobs come as they are: a server that packs what it sends would change their digests.
func TestFetch_Identity(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a"))
	s := serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
		_, digest, ok := strings.Cut(r.URL.Path, "/blobs/")
		if !ok || r.Header.Get("Accept-Encoding") == "identity" {
			return false
		}
		content, err := os.ReadFile(ocitest.Blob(dir, digest))
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(content) // a gzip already, as far as such a server goes
		return true
	})
	pull(t, resolve(t, s.host()+"/a:1", oci.Options{}), t.TempDir())
}

// memory is a registry without a network.
type memory struct{ h http.Handler }

func (m memory) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	m.h.ServeHTTP(w, r)
	resp := w.Result()
	resp.Request, resp.Body = r, attentive{resp.Body, r.Context()}
	return resp, nil
}

// attentive ends with its request, as a connection does.
type attentive struct {
	io.ReadCloser
	ctx context.Context
}

func (a attentive) Read(p []byte) (int, error) {
	if err := a.ctx.Err(); err != nil {
		return 0, err
	}
	return a.ReadCloser.Read(p)
}

// silence never ends, but with its request.
type silence struct{ end <-chan struct{} }

func (s silence) Read([]byte) (int, error) { <-s.end; return 0, io.ErrClosedPipe }
func (silence) Close() error               { return nil }

// A disk may take as long as it likes; a server may not.
func TestFetch_Slow(t *testing.T) {
	dir, layers := t.TempDir(), t.TempDir()
	add(t, dir, "1", noise(500_000, 0))
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		i, err := oci.Resolve(t.Context(), "localhost/a:1",
			oci.Options{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
				asked++
				return memory{ocitest.Registry(dir)}.RoundTrip(r)
			})})
		if err != nil {
			t.Fatal(err)
		}
		before := asked
		// Progress is told where a write would be.
		if err := i.Fetch(t.Context(), layers, func(int64, int64) {
			time.Sleep(2 * time.Minute)
		}); err != nil || asked != before+1 {
			t.Errorf("with a slow disk: %v, asked %d times", err, asked-before)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		i, err := oci.Resolve(t.Context(), "localhost/a:1",
			oci.Options{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
				resp, err := memory{ocitest.Registry(dir)}.RoundTrip(r)
				if err == nil && resp.Request.URL.Path != "/v2/" && resp.ContentLength > 100_000 {
					asked++
					resp.Body = silence{r.Context().Done()}
				}
				return resp, err
			})})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := i.Fetch(t.Context(), t.TempDir(), nil); err == nil ||
			!strings.Contains(err.Error(), "nothing came for 1m0s") || asked != 6 {
			t.Errorf("with a silent server: %v after %v, asked %d times", err, time.Since(began), asked)
		}
	})
}

type roundTrip func(r *http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A tag that leads to what it led to is found out without asking for a manifest, which registries
// count.
func TestResolve_Unless(t *testing.T) {
	dir := t.TempDir()
	d := add(t, dir, "1", files("a"))
	index, err := ocitest.AddIndex(dir, d)
	if err == nil {
		err = ocitest.Tag(dir, "all", index)
	}
	if err != nil {
		t.Fatal(err)
	}
	add(t, dir, "2", files("b"))
	s := serve(t, dir, nil)
	for tag, want := range map[string]string{"1": d.Digest, "all": index.Digest} {
		if i := resolve(t, s.host()+"/a:"+tag, oci.Options{Unless: "sha256:" + strings.Repeat("0", 64)}); first(i.Index,
			i.Digest) != want || i.Digest != d.Digest {
			t.Errorf("%s leads to %s and %s, want %s", tag, i.Index, i.Digest, want)
		}
		s.requests()
		if _, err := oci.Resolve(t.Context(), s.host()+"/a:"+tag, oci.Options{Unless: want}); !errors.Is(err,
			oci.ErrUnchanged) {
			t.Errorf("%s: %v, want ErrUnchanged", tag, err)
		}
		if diff := cmp.Diff([]string{"GET /v2/", "HEAD /v2/a/manifests/" + tag}, s.requests()); diff != "" {
			t.Error(diff)
		}
	}
	resolve(t, s.host()+"/a:2", oci.Options{Unless: d.Digest})
	// A registry that does not answer is asked for the manifest itself.
	s.instead = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodHead {
			w.WriteHeader(http.StatusMethodNotAllowed)
		}
		return r.Method == http.MethodHead
	}
	resolve(t, s.host()+"/a:1", oci.Options{Unless: d.Digest})
}

// requests are all since the last call.
func (s *server) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.asked
	s.asked = nil
	return all
}

// Without a network, it is said which registry cannot be reached, why, and what can be done
// instead.
func TestResolve_Unreachable(t *testing.T) {
	closed := serve(t, t.TempDir(), nil)
	closed.Close()
	noName := roundTrip(func(r *http.Request) (*http.Response, error) {
		return nil, &net.OpError{
			Op: "dial", Net: "tcp",
			Err: &net.DNSError{Err: "no such host", Name: r.URL.Hostname(), IsNotFound: true},
		}
	})
	for _, c := range []struct {
		ref, want string
		o         oci.Options
	}{
		{
			"nosuch", "registry index.docker.io cannot be reached: its name cannot be looked up: no such host",
			oci.Options{Transport: noName},
		},
		{
			"nosuch", "registry index.docker.io cannot be reached: its name cannot be looked up: no such host",
			oci.Options{Transport: noName, Mirrors: []string{"mirror.test"}},
		},
		{
			closed.host() + "/a", "registry " + closed.host() + " cannot be reached: connect: connection refused",
			oci.Options{},
		},
	} {
		_, err := oci.Resolve(t.Context(), c.ref, c.o)
		var unreachable *oci.UnreachableError
		if want := fmt.Sprintf("resolve image %q: %s", c.ref, c.want); !errors.As(err, &unreachable) || err.Error() != want {
			t.Errorf("%v\nwant %s", err, want)
		}
		if got := adviceOf(err); !strings.Contains(got, "smartvm image ls") {
			t.Errorf("hint %q", got)
		}
	}
	s := serve(t, t.TempDir(), func(w http.ResponseWriter, r *http.Request) bool {
		w.WriteHeader(http.StatusUnauthorized)
		return r.URL.Path != "/v2/"
	})
	if _, err := oci.Resolve(t.Context(), s.host()+"/nosuch", oci.Options{}); err == nil ||
		!strings.Contains(adviceOf(err), "docker login "+s.host()) {
		t.Errorf("%v, hint %q", err, adviceOf(err))
	}
}

// first is a, or b if that is empty.
func first(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

// A login that was given for an image is its registry's; a mirror is not told it, and the
// keychain's is the mirror's alone then.
func TestResolve_Login(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a"))
	told := func(to *[]string, serves bool) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if user, password, ok := r.BasicAuth(); ok {
				*to = append(*to, user+":"+password)
			} else {
				w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			if !serves && r.URL.Path != "/v2/" {
				http.NotFound(w, r)
				return true
			}
			return false
		}
	}
	var mirrors, registrys []string
	mirror, registry := serve(t, dir, told(&mirrors, false)), serve(t, dir, told(&registrys, true))
	text := fmt.Sprintf("[[registry]]\nlocation = %q\n[[registry.mirror]]\nlocation = %q\n", registry.host(),
		mirror.host())
	o := oci.Options{
		Login:    &authn.Basic{Username: "me", Password: "secret"},
		Keychain: keys{mirror.host(): "mirror", registry.host(): "stale"}, Registries: conf(t, text),
	}
	pull(t, resolve(t, registry.host()+"/app:1", o), t.TempDir())
	all := func(list []string) []string { slices.Sort(list); return slices.Compact(list) }
	if diff := cmp.Diff([][]string{{"mirror:word"}, {"me:secret"}}, [][]string{all(mirrors), all(registrys)}); diff != "" {
		t.Error(diff)
	}
}

// keys are users by registry.
type keys map[string]string

func (k keys) Resolve(r authn.Resource) (authn.Authenticator, error) {
	return &authn.Basic{Username: k[r.RegistryStr()], Password: "word"}, nil
}
