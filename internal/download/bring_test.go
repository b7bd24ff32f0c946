package download_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/download"
)

var errPlace = errors.New("it has gone")

// breaksOff is a body that ends with an error.
func breaksOff(data []byte) io.Reader {
	return io.MultiReader(bytes.NewReader(data), readFunc(func([]byte) (int, error) { return 0, errPlace }))
}

type readFunc func(p []byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

// What one place does not give, or gives wrongly, comes from the next, and what was right is not
// fetched twice.
func TestBring_Elsewhere(t *testing.T) {
	data := content(1000)
	other := make([]byte, 1000)
	type place = func(offset int64) (io.Reader, error)
	good := func(offset int64) (io.Reader, error) { return bytes.NewReader(data[offset:]), nil }
	wrong := func(offset int64) (io.Reader, error) { return bytes.NewReader(other[offset:]), nil }
	half := func(content []byte) place { // and no more
		return func(offset int64) (io.Reader, error) { return breaksOff(content[offset:max(offset, 500)]), nil }
	}
	crumbs := func(offset int64) (io.Reader, error) { return breaksOff(data[offset:min(offset+100, 1000)]), nil }
	lost := func(int64) (io.Reader, error) { return nil, errPlace }
	for _, tt := range []struct {
		name   string
		places []place
		asked  []int64 // from which offset
		want   error
		left   []string
	}{
		{name: "one", places: []place{good}, asked: []int64{0}},
		{name: "breaks off for good", places: []place{half(data), good}, asked: []int64{0, 500, 500, 500, 500, 500, 500}},
		{name: "gives something else", places: []place{wrong, good}, asked: []int64{0, 0}},
		{
			name: "gives half of something else", places: []place{half(other), good},
			asked: []int64{0, 500, 500, 500, 500, 500, 500, 0},
		},
		{name: "gives too much", places: []place{
			func(int64) (io.Reader, error) { return bytes.NewReader(append(data[:1000:1000], 0)), nil }, good,
		}, asked: []int64{0, 0}},
		{
			name: "gives something else, and the next little at a time", places: []place{wrong, crumbs},
			asked: []int64{0, 0, 100, 200, 300, 400, 500, 600, 700, 800, 900},
		},
		{
			name: "three are wrong in all ways", places: []place{half(other), wrong, half(other), good},
			asked: []int64{0, 500, 500, 500, 500, 500, 500, 0, 0, 500, 500, 500, 500, 500, 500, 0},
		},
		{
			name: "all give something else", places: []place{wrong, wrong}, asked: []int64{0, 0},
			want: new(download.DigestError),
		},
		{
			name: "all break off", places: []place{half(data), half(data)}, want: errPlace, left: []string{"file.partial"},
			asked: []int64{0, 500, 500, 500, 500, 500, 500, 500, 500, 500, 500, 500},
		},
		// Open asks everywhere before it says so.
		{name: "is lost", places: []place{lost, good}, asked: []int64{0}, want: errPlace},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "file")
			places := slices.Clone(tt.places)
			var asked []int64
			err := quick(nil).Bring(t.Context(), path, download.Transfer{
				SHA256: digest(data), Size: 1000, MaxSize: 1000,
				Open: func(_ context.Context, offset int64) (*download.Body, error) {
					asked = append(asked, offset)
					r, err := places[0](offset)
					return &download.Body{ReadCloser: io.NopCloser(r), Start: offset}, err
				},
				Elsewhere: func(error) bool {
					if len(places) == 1 {
						return false
					}
					places = places[1:]
					return true
				},
			})
			if diff := cmp.Diff(tt.asked, asked); diff != "" {
				t.Errorf("offsets, -want +got:\n%s", diff)
			}
			if tt.want == nil && err == nil {
				wantContent(t, path, data)
				return
			}
			wantError(t, err, tt.want)
			wantNames(t, dir, tt.left...)
		})
	}
}

// Whoever reads the partial file knows at each time how much of it holds.
func TestBring_Progress(t *testing.T) {
	data := content(1000)
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path+download.PartialSuffix, make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	var got [][2]int64
	want := download.Transfer{
		SHA256: digest(data), MaxSize: 1000,
		Open: func(_ context.Context, offset int64) (*download.Body, error) {
			return &download.Body{ReadCloser: io.NopCloser(bytes.NewReader(data[offset:])), Start: offset, Total: 1000}, nil
		},
		Progress: func(done, total int64) {
			got = append(got, [2]int64{done, total})
			if fi, err := os.Stat(path + download.PartialSuffix); err != nil || fi.Size() < done || done == 0 && fi.Size() == 0 {
				t.Errorf("%d bytes are said to be in a file: %v, %v", done, fi, err)
			}
		},
	}
	if err := quick(nil).Bring(t.Context(), path, want); err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, data)
	if diff := cmp.Diff([][2]int64{{100, 0}, {1000, 1000}, {0, 1000}, {1000, 1000}}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
