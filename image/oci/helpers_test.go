package oci_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/ocitest"
)

// files is a layer of files, their content their name's.
func files(names ...string) ocitest.Layer {
	return func(w *tar.Writer) error {
		for _, n := range names {
			err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: n, Mode: 0o644, Size: int64(len(n))})
			if err == nil {
				_, err = io.WriteString(w, n)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// noise is a layer that does not pack.
func noise(size int, seed byte) ocitest.Layer {
	return func(w *tar.Writer) error {
		b := make([]byte, size)
		x := uint32(seed) + 1
		for i := range b {
			x ^= x << 13
			x ^= x >> 17
			x ^= x << 5
			b[i] = byte(x)
		}
		err := w.WriteHeader(
			&tar.Header{Typeflag: tar.TypeReg, Name: "noise" + string('a'+rune(seed)), Mode: 0o644, Size: int64(size)})
		if err == nil {
			_, err = w.Write(b)
		}
		return err
	}
}

// add makes an image in a layout and tags it.
func add(t testing.TB, dir, tag string, layers ...ocitest.Layer) ocitest.Descriptor {
	t.Helper()
	d, err := ocitest.Add(dir, "amd64", layers...)
	if err == nil {
		err = ocitest.Tag(dir, tag, d)
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// server is a registry that notes what it is asked, and may answer otherwise first.
type server struct {
	*httptest.Server
	mu    sync.Mutex
	asked []string // "GET /v2/a/blobs/sha256:… bytes=5-"
	// instead answers in the registry's place, if it returns true.
	instead func(w http.ResponseWriter, r *http.Request) bool
}

func serve(t testing.TB, dir string, instead func(w http.ResponseWriter, r *http.Request) bool) *server {
	t.Helper()
	return serveOn(t, nil, dir, instead)
}

func serveOn(t testing.TB, l net.Listener, dir string,
	instead func(w http.ResponseWriter, r *http.Request) bool,
) *server {
	t.Helper()
	s := &server{instead: instead}
	h := ocitest.Registry(dir)
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.asked = append(s.asked, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+r.Header.Get("Range")))
		s.mu.Unlock()
		if s.instead == nil || !s.instead(w, r) {
			h.ServeHTTP(w, r)
		}
	}))
	if l != nil {
		if err := s.Listener.Close(); err != nil {
			t.Fatal(err)
		}
		s.Listener = l
	}
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// network is a bubble's, in which pauses take no time.
type network struct {
	*http.Transport
	listeners map[string]*listener // by address
}

func newNetwork(t testing.TB) *network {
	n := &network{listeners: map[string]*listener{}}
	n.Transport = &http.Transport{DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
		l := n.listeners[addr]
		if l == nil {
			return nil, syscall.ECONNREFUSED
		}
		near, far := net.Pipe()
		select {
		case l.conns <- far:
			return near, nil
		case <-l.closed:
			return nil, syscall.ECONNREFUSED
		}
	}}
	t.Cleanup(n.CloseIdleConnections)
	return n
}

func (n *network) serve(t testing.TB, dir string, instead func(w http.ResponseWriter, r *http.Request) bool) *server {
	t.Helper()
	l := &listener{
		addr: fmt.Sprintf("localhost:%d", len(n.listeners)+1), conns: make(chan net.Conn),
		closed: make(chan struct{}),
	}
	n.listeners[l.addr] = l
	return serveOn(t, l, dir, instead)
}

// listener is a server's in a network. It is its own address.
type listener struct {
	addr   string
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listener) Addr() net.Addr  { return l }
func (l *listener) Network() string { return "tcp" }
func (l *listener) String() string  { return l.addr }

// host is where the server is, as references have it.
func (s *server) host() string { return strings.TrimPrefix(s.URL, "http://") }

// blobs are the requests for layers and configurations since the last call.
func (s *server) blobs() (asked []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.asked {
		if strings.Contains(a, "/blobs/") {
			asked = append(asked, a)
		}
	}
	s.asked = nil
	return asked
}

func resolve(t testing.TB, ref string, o oci.Options) *oci.Image {
	t.Helper()
	i, err := oci.Resolve(t.Context(), ref, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := i.Close(); err != nil {
			t.Error(err)
		}
	})
	return i
}

// pull flattens an image, whose layers come into dir.
func pull(t testing.TB, i *oci.Image, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "root.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = i.Flatten(t.Context(), dir, f, nil)
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// have are the names of what a directory holds.
func have(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// layerFiles are the names that an image's layers have once fetched.
func layerFiles(i *oci.Image) (names []string) {
	for _, l := range i.Layers {
		names = append(names, strings.ReplaceAll(l.Digest, ":", "-"))
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// noiseLayer makes a layout with an image of one layer, and returns what is in the layer, and that
// with a wrong bit.
func noiseLayer(t *testing.T) (dir string, l oci.Layer, content, flipped []byte) {
	t.Helper()
	dir = t.TempDir()
	add(t, dir, "1", noise(300_000, 0))
	l = resolve(t, "oci:"+dir, oci.Options{}).Layers[0]
	content, err := os.ReadFile(ocitest.Blob(dir, l.Digest))
	if err != nil {
		t.Fatal(err)
	}
	flipped = bytes.Clone(content)
	flipped[1000] ^= 1
	return dir, l, content, flipped
}
