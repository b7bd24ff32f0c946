package layers

import (
	"context"
	"errors"
	"strings"
	"sync"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/internal/download"
)

// transfer is a layer on its way to a file.
type transfer struct {
	from  Source
	layer manifest.Layer
	path  string // of the finished file
	times int64  // that the image has the layer
	count func(n int64, ended bool)

	mu     sync.Mutex
	news   chan struct{} // closed when what follows changes, and replaced
	begun  bool          // there is a file
	ended  bool          // it is all there, and what it should be
	have   int64         // bytes of it
	starts int           // how often what was there was thrown away
}

// set changes what others may wait for.
func (t *transfer) set(change func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change()
	close(t.news)
	t.news = make(chan struct{})
}

// grow says how many bytes are there now, and whether they are all, and right. What is counted
// comes first: who reads to the end finds all counted.
func (t *transfer) grow(have int64, ended bool) {
	n := have - t.have // which nobody else changes
	t.count(n*t.times, ended)
	t.set(func() {
		if n < 0 {
			t.starts++
		}
		t.begun, t.have, t.ended = true, have, ended
	})
}

func (t *transfer) run(ctx context.Context) error {
	err := new(download.Client).Bring(ctx, t.path, download.Transfer{
		Name: t.layer.Digest, SHA256: strings.TrimPrefix(t.layer.Digest, manifest.Algorithm),
		// A layer without bytes has a size like any other, of which 0 would say that it is unknown.
		Size: t.layer.Size, MaxSize: max(t.layer.Size, 1),
		Open: func(ctx context.Context, offset int64) (*download.Body, error) {
			return t.from.Blob(ctx, t.layer.Digest, offset)
		},
		Elsewhere: func(err error) bool { return t.from.Elsewhere(t.layer.Digest, err) },
		Progress:  func(done, _ int64) { t.grow(done, false) },
	})
	var digest *download.DigestError
	switch {
	case err == nil:
		t.grow(t.layer.Size, true)
	case errors.As(err, &digest):
		err = &flatten.DigestError{What: "layer", Want: t.layer.Digest, Got: manifest.Algorithm + digest.Got}
	case errors.As(err, new(*download.SizeError)):
		err = &flatten.DigestError{What: "layer", Want: t.layer.Digest}
	}
	return err
}
