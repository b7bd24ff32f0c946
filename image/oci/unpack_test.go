package oci_test

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/ocitest"
)

// unpacking is an image that is flattened.
type unpacking struct {
	t    *testing.T
	ctx  context.Context
	dir  string // of layers
	root *os.File
}

func newUnpacking(t *testing.T) *unpacking {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	u := &unpacking{t: t, ctx: ctx, dir: t.TempDir()}
	var err error
	if u.root, err = os.Create(filepath.Join(t.TempDir(), "root.ext4")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := u.root.Close(); err != nil {
			t.Error(err)
		}
	})
	return u
}

// grown waits until there is more than so many bytes of the file system.
func (u *unpacking) grown(size int64) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if fi, err := u.root.Stat(); err != nil {
			u.t.Error(err)
		} else if fi.Size() > size {
			return
		}
		select {
		case <-tick.C:
		case <-u.ctx.Done():
			u.t.Error("nothing is unpacked of what is there")
			return
		}
	}
}

// is compares what has come out with what comes of the same layers in one piece.
func (u *unpacking) is(want *oci.Image) {
	u.t.Helper()
	other := newUnpacking(u.t)
	if _, err := want.Flatten(other.ctx, other.dir, other.root, nil); err != nil {
		u.t.Fatal(err)
	}
	a, err := os.ReadFile(u.root.Name())
	b, berr := os.ReadFile(other.root.Name())
	if err = errors.Join(err, berr); err != nil || len(a) == 0 || !bytes.Equal(a, b) {
		u.t.Errorf("%d bytes of a file system, want another one of %d: %v", len(a), len(b), err)
	}
}

// A layer is unpacked while it arrives, whatever becomes of its download.
func TestFlatten_Arriving(t *testing.T) {
	const size = 6 << 20
	dir := t.TempDir()
	add(t, dir, "1", noise(100_000, 1), noise(size, 0), noise(100_000, 1))
	l := resolve(t, "oci:"+dir, oci.Options{}).Layers[1]
	content, err := os.ReadFile(ocitest.Blob(dir, l.Digest))
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(content)
	flipped[1_000_000] ^= 1
	for _, c := range []struct {
		name    string
		partial []byte // left by an earlier one
		// first answers the first request when the beginning has been unpacked.
		first func(w http.ResponseWriter, r *http.Request, rest []byte)
		asked int
	}{
		{name: "all is well", first: func(w http.ResponseWriter, _ *http.Request, rest []byte) {
			_, _ = w.Write(rest)
		}, asked: 1},
		{name: "it goes on where it was", first: func(http.ResponseWriter, *http.Request, []byte) {
			panic(http.ErrAbortHandler)
		}, asked: 2},
		{name: "it begins anew", first: func(http.ResponseWriter, *http.Request, []byte) {
			panic(http.ErrAbortHandler)
		}, asked: 2},
		{name: "half is there", partial: content[:size/2], first: func(w http.ResponseWriter, _ *http.Request, rest []byte) {
			_, _ = w.Write(rest)
		}, asked: 1},
		{
			name: "rubbish is there", partial: flipped[:size/2],
			first: func(w http.ResponseWriter, _ *http.Request, rest []byte) {
				_, _ = w.Write(rest)
			}, asked: 2,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := newUnpacking(t)
			var asked atomic.Int32
			s := serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
				if !blob(r, l.Digest) {
					return false
				}
				var from int
				if text, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
					from, _ = strconv.Atoi(strings.TrimSuffix(text, "-"))
				}
				if asked.Add(1) > 1 {
					if c.name == "it begins anew" {
						_, _ = w.Write(content) // it knows no ranges
						return true
					}
					return false
				}
				w.Header().Set("Content-Length", strconv.Itoa(len(content)-from))
				if from > 0 {
					w.Header().Set("Content-Range", "bytes "+strconv.Itoa(from)+"-")
					w.WriteHeader(http.StatusPartialContent)
				}
				_, _ = w.Write(content[from : size*3/4])
				_ = http.NewResponseController(w).Flush()
				u.grown(size / 2)
				c.first(w, r, content[size*3/4:])
				return true
			})
			if c.partial != nil {
				if err := os.WriteFile(filepath.Join(u.dir, strings.ReplaceAll(l.Digest, ":", "-")+".partial"), c.partial,
					0o600); err != nil {
					t.Fatal(err)
				}
			}
			i := resolve(t, s.host()+"/a:1", oci.Options{})
			var steps []string
			var last int64
			_, err := i.Flatten(u.ctx, u.dir, u.root, func(step string, done, total int64) {
				if len(steps) == 0 || steps[len(steps)-1] != step {
					steps = append(steps, step)
				}
				last = done
				if done > total {
					t.Errorf("%d of %d bytes", done, total)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{"fetch", "unpack"}, steps); diff != "" || last != i.Size {
				t.Errorf("%d of %d bytes, steps: %s", last, i.Size, diff)
			}
			if int(asked.Load()) != c.asked {
				t.Errorf("asked %d times, want %d", asked.Load(), c.asked)
			}
			if diff := cmp.Diff(layerFiles(i), have(t, u.dir)); diff != "" {
				t.Error(diff)
			}
			u.is(resolve(t, serve(t, dir, nil).host()+"/a:1", oci.Options{}))
		})
	}
}

// What one layer comes to ends all: one that is still waited for, and the unpacking of another.
func TestFlatten_Ends(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a", "b", "c"), noise(100_000, 1))
	layers := resolve(t, "oci:"+dir, oci.Options{}).Layers
	content, err := os.ReadFile(ocitest.Blob(dir, layers[0].Digest))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		lower func(cancel func(error), w http.ResponseWriter, r *http.Request)
		upper func(w http.ResponseWriter, r *http.Request)
		limit int64
		want  error
	}{
		{
			name: "one is not there", want: oci.ErrNotFound, upper: status(http.StatusNotFound),
			lower: func(_ func(error), w http.ResponseWriter, r *http.Request) {
				_, _ = w.Write(content[:len(content)-9])
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done() // which is when the client goes
			},
		},
		{
			name: "canceled", want: errAny,
			lower: func(cancel func(error), _ http.ResponseWriter, r *http.Request) {
				cancel(errAny)
				<-r.Context().Done()
			},
		},
		{
			name: "too many entries", want: &flatten.LimitError{}, limit: 2,
			lower: func(_ func(error), w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(content) },
			upper: func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := newUnpacking(t)
			ctx, cancel := context.WithCancelCause(u.ctx)
			defer cancel(nil)
			s := serve(t, dir, func(w http.ResponseWriter, r *http.Request) bool {
				switch {
				case blob(r, layers[0].Digest):
					c.lower(cancel, w, r)
				case blob(r, layers[1].Digest) && c.upper != nil:
					c.upper(w, r)
				default:
					return false
				}
				return true
			})
			i := resolve(t, s.host()+"/a:1", oci.Options{Limits: flatten.Limits{MaxEntries: c.limit}})
			_, err := i.Flatten(ctx, u.dir, u.root, nil)
			if !like(err, c.want) || u.ctx.Err() != nil {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

// A layer that is not what the configuration says is refused, though it is what the manifest says.
func TestFlatten_WrongDiffID(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a"), files("b"), files("c"))
	i := resolve(t, serve(t, dir, nil).host()+"/a:1", oci.Options{})
	u := newUnpacking(t)
	right := i.Layers[1].DiffID
	i.Layers[1].DiffID = i.Layers[0].Digest
	var wrong *flatten.DigestError
	if _, err := i.Flatten(u.ctx, u.dir, u.root, nil); !errors.As(err, &wrong) || wrong.Got != right {
		t.Errorf("%v, want a DigestError", err)
	}
	i.Layers[1].DiffID = right
	if _, err := i.Flatten(u.ctx, u.dir, u.root, nil); err != nil {
		t.Error(err)
	}
}

// Layers of a layout are checked where they are, and stay there.
func TestFlatten_InPlace(t *testing.T) {
	dir := t.TempDir()
	add(t, dir, "1", files("a"), files("b"))
	i := resolve(t, "oci:"+dir, oci.Options{})
	blob := ocitest.Blob(dir, i.Layers[0].Digest)
	content, err := os.ReadFile(blob)
	if err != nil {
		t.Fatal(err)
	}
	dated := bytes.Clone(content)
	dated[4] ^= 1 // gzip's time: what is in it stays the same
	for name, c := range map[string]struct {
		content []byte
		want    error
	}{
		"as it was":     {content, nil},
		"another file":  {dated, &flatten.DigestError{}},
		"longer":        {append(bytes.Clone(content), 0), &flatten.DigestError{}},
		"shorter":       {content[:len(content)-1], &flatten.DigestError{}},
		"not there":     {nil, oci.ErrNotFound},
		"another layer": {content, &flatten.DigestError{}},
	} {
		t.Run(name, func(t *testing.T) {
			err := os.WriteFile(blob, c.content, 0o600)
			if c.content == nil {
				err = os.Remove(blob)
			}
			if err != nil {
				t.Fatal(err)
			}
			i, u := resolve(t, "oci:"+dir, oci.Options{}), newUnpacking(t)
			if name == "another layer" {
				i.Layers[0].DiffID = i.Layers[1].DiffID
			}
			var steps []string
			_, err = i.Flatten(u.ctx, u.dir, u.root, func(step string, _, _ int64) { steps = append(steps, step) })
			if c.want == nil && err != nil || c.want != nil && !like(err, c.want) || slices.Contains(steps, "fetch") {
				t.Errorf("%v, want %v; steps: %q", err, c.want, steps)
			}
			if got, err := os.ReadFile(blob); c.content != nil && (err != nil || !bytes.Equal(got, c.content)) {
				t.Errorf("the file is not as it was: %v", err)
			}
			if got := have(t, u.dir); len(got) > 0 {
				t.Errorf("%q were copied", got)
			}
		})
	}
}
