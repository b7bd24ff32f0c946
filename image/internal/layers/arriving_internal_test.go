package layers

import (
	"io"
	"os"
	"path/filepath"
	"testing"
)

// A layer is read from where it is, though it was moved there a moment ago and nobody has been
// told.
func TestOpen_Moved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(path, []byte("all"), 0o600); err != nil {
		t.Fatal(err)
	}
	moved := &transfer{path: path, begun: true, have: 3, news: make(chan struct{})}
	f := &Fetch{layers: map[string]*transfer{"sha256:0": moved}}
	a, err := f.Open(t.Context(), "sha256:0")
	if err != nil {
		t.Fatal(err)
	}
	moved.ended = true
	if got, err := io.ReadAll(a); err != nil || string(got) != "all" {
		t.Errorf("%q, %v", got, err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}
