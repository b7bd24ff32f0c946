// Package layers brings layers of images into a directory, verified, and lets others read them
// while they arrive.
package layers

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"

	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/internal/download"
)

// Source is where layers come from. Its functions are safe for concurrent use.
type Source struct {
	// Blob reads from offset on or, where that is not possible, from the start on.
	Blob func(ctx context.Context, digest string, offset int64) (*download.Body, error)
	// Elsewhere says that what came of a blob was of no use. It returns whether there is another place
	// that will be asked.
	Elsewhere func(digest string, err error) bool
}

// atOnce is how many layers are fetched at the same time.
const atOnce = 3

// Path is where a directory has a layer, or another blob.
func Path(dir, digest string) string { return filepath.Join(dir, strings.ReplaceAll(digest, ":", "-")) }

// Fetch brings layers into a directory, each as "sha256-" and its digest, and verifies them. Layers
// that are there already are not fetched again, and what an interruption left of one (its name ends
// in ".partial") is not either, if the source can send the rest. Any number of processes may fetch
// into one directory.
type Fetch struct {
	From     Source
	Layers   []manifest.Layer // the first are brought first
	Dir      string
	Progress func(done int64) // is told of bytes that are there, by one goroutine at a time

	sync.WaitGroup // of all that Start begins
	layers         map[string]*transfer
	mu             sync.Mutex
	done           int64
	ended          int // layers
}

// Start begins. What one layer fails with ends all, by cancel, which is ctx's. The caller waits.
// Errors are *flatten.DigestError and those of the source and of files.
func (f *Fetch) Start(ctx context.Context, cancel context.CancelCauseFunc) {
	f.layers = map[string]*transfer{}
	var all []*transfer
	for _, l := range f.Layers {
		if t := f.layers[l.Digest]; t != nil {
			t.times++
			continue
		}
		t := &transfer{
			from: f.From, layer: l, path: Path(f.Dir, l.Digest), times: 1, count: f.count,
			news: make(chan struct{}),
		}
		f.layers[l.Digest], all = t, append(all, t)
	}
	f.Go(func() {
		turn := make(chan struct{}, atOnce)
		for _, t := range all {
			turn <- struct{}{}
			if ctx.Err() != nil {
				return
			}
			f.Go(func() {
				defer func() { <-turn }()
				if err := t.run(ctx); err != nil {
					cancel(fmt.Errorf("fetch layer: %w", err))
				}
			})
		}
	})
}

func (f *Fetch) count(n int64, ended bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done += n
	if ended {
		f.ended++
	}
	if n != 0 {
		f.Progress(f.done)
	}
}

// Whole says whether all layers are there, and verified.
func (f *Fetch) Whole() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ended == len(f.layers)
}
