package oci_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/ocitest"
)

// blob says whether a request is for a layer, the image's configuration being smaller than any.
func blob(r *http.Request, digest string) bool {
	return strings.HasSuffix(r.URL.Path, "/blobs/"+digest)
}

// A second image that shares nine layers of ten moves one.
func TestFetch_Shared(t *testing.T) {
	dir := t.TempDir()
	var all []ocitest.Layer
	for n := range 10 {
		all = append(all, files("f"+strconv.Itoa(n)))
	}
	add(t, dir, "1", all...)
	add(t, dir, "2", append(all[:9:9], files("other"))...)
	s := serve(t, dir, nil)
	layers := t.TempDir()
	pull(t, resolve(t, s.host()+"/a:1", oci.Options{}), layers)
	if got := s.blobs(); len(got) != 11 {
		t.Errorf("%d blobs for the first, want 10 layers and a configuration", len(got))
	}
	second := resolve(t, s.host()+"/a:2", oci.Options{})
	var last int64
	if err := second.Fetch(t.Context(), layers, func(done, total int64) {
		last = done
		if total != second.Size {
			t.Errorf("total %d, want %d", total, second.Size)
		}
	}); err != nil || last != second.Size {
		t.Errorf("%d of %d bytes: %v", last, second.Size, err)
	}
	if got := s.blobs(); len(got) != 2 {
		t.Errorf("%d blobs for the second, want 1 layer and a configuration", len(got))
	}
	if got := len(have(t, layers)); got != 11 {
		t.Errorf("%d files, want 11", got)
	}
}

// The layers that are unpacked first are fetched first.
func TestFetch_LowestFirst(t *testing.T) {
	dir := t.TempDir()
	var all []ocitest.Layer
	for n := range 6 {
		all = append(all, files("f"+strconv.Itoa(n)))
	}
	add(t, dir, "1", all...)
	var mu sync.Mutex
	var asked []string
	three := make(chan struct{})
	var fetching atomic.Bool
	s := serve(t, dir, func(_ http.ResponseWriter, r *http.Request) bool {
		if !fetching.Load() || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		mu.Lock()
		if asked = append(asked, path.Base(r.URL.Path)); len(asked) == 3 {
			close(three)
		}
		mu.Unlock()
		select {
		case <-three:
		case <-r.Context().Done():
		}
		return false
	})
	i := resolve(t, s.host()+"/a:1", oci.Options{})
	fetching.Store(true)
	if err := i.Fetch(t.Context(), t.TempDir(), nil); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, l := range i.Layers[:3] {
		if !slices.Contains(asked[:3], l.Digest) {
			t.Errorf("%s is not among the first three: %q", l.Digest, asked)
		}
	}
}

// answers makes a handler give each answer of a list once to requests for a blob.
func answers(digest string, list ...func(w http.ResponseWriter, r *http.Request)) func(w http.ResponseWriter,
	r *http.Request) bool {
	var n atomic.Int32
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !blob(r, digest) {
			return false
		}
		i := int(n.Add(1)) - 1
		if i >= len(list) {
			return false
		}
		list[i](w, r)
		return true
	}
}

func status(code int) func(w http.ResponseWriter, r *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "0")
		w.WriteHeader(code)
	}
}

func hangUp(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// firstBytes sends a blob's beginning and hangs up.
func firstBytes(content []byte, n int) func(w http.ResponseWriter, r *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		_, _ = w.Write(content[:n])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
}

func plain(content []byte) func(w http.ResponseWriter, r *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(content) }
}

// early sends a blob's beginning and does not say that there is more.
func early(content []byte, n int) func(w http.ResponseWriter, r *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		_ = http.NewResponseController(w).Flush() // before its length is known
		_, _ = w.Write(content[:n])
	}
}

// inBubble is a subtest in which time passes when all wait.
func inBubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, f)
	})
}

func TestFetch_Faults(t *testing.T) {
	dir, l, content, flipped := noiseLayer(t)
	type handler = func(w http.ResponseWriter, r *http.Request)
	for _, c := range []struct {
		name    string
		answers []handler
		partial []byte // left by an earlier one
		whole   []byte // as well, under the layer's name
		want    error
		asked   int
	}{
		{name: "all is well", asked: 1},
		{name: "busy", answers: []handler{status(429), status(503), status(500)}, asked: 4},
		{name: "hangs up before it answers", answers: []handler{hangUp}, asked: 2},
		{name: "hangs up in the middle", answers: []handler{firstBytes(content, 100_000)}, asked: 2},
		{
			name: "hangs up and knows no ranges then", answers: []handler{firstBytes(content, 100_000), plain(content)},
			asked: 2,
		},
		{name: "ends early, politely", answers: []handler{early(content, 100_000)}, asked: 2},
		{name: "half is there", partial: content[:150_000], asked: 1},
		{name: "all is there", partial: content, asked: 0},
		{name: "too much is there", partial: append(bytes.Clone(content), "more"...), asked: 1},
		{name: "rubbish is there", partial: flipped[:150_000], asked: 2},
		{name: "it is there", whole: content, asked: 0},
		{name: "it is there, and has been damaged since", whole: flipped, asked: 1},
		{name: "it is there, but for its end", whole: content[:150_000], asked: 1},
		{
			name: "something is there, no range can be had", partial: content[:150_000],
			answers: []handler{status(416)}, asked: 2,
		},
		{
			name: "another range than was asked for", partial: content[:150_000],
			answers: []handler{func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Range", "bytes 7-9/10")
				w.WriteHeader(http.StatusPartialContent)
			}}, asked: 2,
		},
		{
			name: "no range can be had, and none was asked for", answers: []handler{status(416)}, asked: 1,
			want: &transport.Error{},
		},
		{name: "a range, and none was asked for", answers: []handler{status(206)}, asked: 1, want: &transport.Error{}},
		{name: "wrong content", answers: []handler{plain(flipped)}, asked: 1, want: &flatten.DigestError{}},
		{
			name: "too much content", answers: []handler{plain(append(bytes.Clone(content), "more"...))}, asked: 1,
			want: &flatten.DigestError{},
		},
		{name: "not found", answers: []handler{status(404)}, asked: 1, want: oci.ErrNotFound},
		{name: "too little content", answers: []handler{plain(content[:9])}, asked: 1, want: &flatten.DigestError{}},
		{name: "ends early each time", answers: []handler{
			early(content, 9), early(content, 9), early(content, 9), early(content, 9), early(content, 9), early(content, 9),
		}, asked: 6, want: io.ErrUnexpectedEOF},
		{
			name:    "busy for good",
			answers: []handler{status(500), status(500), status(500), status(500), status(500), status(500)}, asked: 6,
			want: &transport.Error{},
		},
		{name: "busy for an hour", answers: []handler{func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "3600")
			w.WriteHeader(429)
		}}, asked: 1, want: &transport.Error{}},
	} {
		inBubble(t, c.name, func(t *testing.T) {
			n := newNetwork(t)
			s := n.serve(t, dir, answers(l.Digest, c.answers...))
			layers := t.TempDir()
			name := strings.ReplaceAll(l.Digest, ":", "-")
			for n, left := range map[string][]byte{name + ".partial": c.partial, name: c.whole} {
				if left == nil {
					continue
				}
				if err := os.WriteFile(filepath.Join(layers, n), left, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			i := resolve(t, s.host()+"/a:1", oci.Options{Transport: n.Transport})
			s.blobs()
			err := i.Fetch(t.Context(), layers, nil)
			if got := len(s.blobs()); got != c.asked {
				t.Errorf("asked %d times, want %d", got, c.asked)
			}
			if c.want != nil {
				if !like(err, c.want) {
					t.Errorf("%v, want %T", err, c.want)
				}
				if got := have(t, layers); len(got) > 0 && got[0] == name {
					t.Error("the layer is there all the same")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(filepath.Join(layers, name)); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes, which are not what they should be: %v", len(got), err)
			}
			if diff := cmp.Diff([]string{name}, have(t, layers)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

var errAny = errors.New("any")

// like says whether err is want, or of its type.
func like(err, want error) bool {
	switch want := want.(type) {
	case *flatten.DigestError:
		return errors.As(err, &want)
	case *flatten.LimitError:
		return errors.As(err, &want)
	case *transport.Error:
		return errors.As(err, &want)
	}
	return errors.Is(err, want) || want == errAny && err != nil
}

func TestFetch_Cancel(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", noise(100_000, 0))
	digest := resolve(t, "oci:"+dir, oci.Options{}).Layers[0].Digest
	asked := make(chan struct{})
	s := serve(t, dir, answers(digest, func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done() // which is when the client goes
	}))
	i := resolve(t, s.host()+"/a:1", oci.Options{})
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		<-asked
		cancel(errAny)
	}()
	if err := i.Fetch(ctx, t.TempDir(), nil); !errors.Is(err, errAny) {
		t.Errorf("%v, want the context's cause", err)
	}
}

// Fetchers of one directory, in this process and others, fetch each layer once.
func TestFetch_Together(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", noise(200_000, 0), noise(200_000, 1), noise(200_000, 2))
	s := serve(t, dir, nil)
	layers := t.TempDir()
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			cmd := child(t.Context(), s.host()+"/a:1", layers)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	i := resolve(t, s.host()+"/a:1", oci.Options{})
	if err := i.Fetch(t.Context(), layers, nil); err != nil {
		t.Error(err)
	}
	wg.Wait()
	fetched := 0
	for _, a := range s.blobs() {
		for _, l := range i.Layers {
			if strings.HasSuffix(a, l.Digest) {
				fetched++
			}
		}
	}
	if fetched != 3 {
		t.Errorf("3 layers were fetched %d times", fetched)
	}
	if diff := cmp.Diff(layerFiles(i), have(t, layers)); diff != "" {
		t.Error(diff)
	}
}

// What a killed process has fetched is not fetched again.
func TestFetch_Killed(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", noise(3_000_000, 0))
	digest := resolve(t, "oci:"+dir, oci.Options{}).Layers[0].Digest
	content, err := os.ReadFile(ocitest.Blob(dir, digest))
	if err != nil {
		t.Fatal(err)
	}
	layers := t.TempDir()
	partial := filepath.Join(layers, strings.ReplaceAll(digest, ":", "-")+".partial")
	half := len(content) / 2
	gone := make(chan struct{})
	s := serve(t, dir, answers(digest, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		_, _ = w.Write(content[:half])
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done() // the process is dead
		close(gone)
	}))
	cmd := child(t.Context(), s.host()+"/a:1", layers)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for fi, err := os.Stat(partial); err != nil || fi.Size() < int64(half); fi, err = os.Stat(partial) {
		<-tick.C
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it says that it was killed
	<-gone
	s.blobs()
	i := resolve(t, s.host()+"/a:1", oci.Options{})
	pull(t, i, layers)
	asked := s.blobs()
	if want := " bytes=" + strconv.Itoa(half) + "-"; len(asked) != 2 || !strings.HasSuffix(asked[1], want) {
		t.Errorf("%q, want the configuration and%s", asked, want)
	}
}

// child fetches an image in a process of its own.
func child(ctx context.Context, ref, layers string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^TestChild$")
	cmd.Env = append(os.Environ(), "OCI_TEST_CHILD="+ref+"\n"+layers)
	return cmd
}

func TestChild(t *testing.T) {
	ref, layers, ok := strings.Cut(os.Getenv("OCI_TEST_CHILD"), "\n")
	if !ok {
		t.Skip("is for child processes")
	}
	if err := resolve(t, ref, oci.Options{}).Fetch(t.Context(), layers, nil); err != nil {
		t.Fatal(err)
	}
}

// A server that hangs up often is borne with as long as it sends something in between.
func TestFetch_HangsUpOften(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", noise(9<<20, 0))
	digest := resolve(t, "oci:"+dir, oci.Options{}).Layers[0].Digest
	content, err := os.ReadFile(ocitest.Blob(dir, digest))
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
		if !blob(r, digest) {
			return false
		}
		var from int
		if text, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
			if from, err = strconv.Atoi(strings.TrimSuffix(text, "-")); err != nil {
				t.Error(err)
			}
			w.Header().Set("Content-Range", "bytes "+text+"/")
			w.WriteHeader(http.StatusPartialContent)
		}
		_, _ = w.Write(content[from:min(from+1_200_000, len(content))])
		return true
	})
	pull(t, resolve(t, s.host()+"/a:1", oci.Options{}), t.TempDir())
	if got := len(s.blobs()); got < 8 {
		t.Errorf("it hung up %d times only", got)
	}
}
