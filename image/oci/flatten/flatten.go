package flatten

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"push.rocks/smartvm/internal/stream"
)

// Stats say what an image was made of.
type Stats struct {
	Entries  int64 // of all layers' tars
	Bytes    int64 // of all their files
	Unpacked int64 // of all layers' tars as they are
	// Passes is how often layers were read: 1, or 2 where names within one layer override each other.
	Passes int
}

// Layer is a tar, packed with gzip, zstd or not at all, with whiteouts of what lower layers have.
type Layer struct {
	DiffID string // "sha256:…", of the tar
	// Open reads it from its beginning. It is called once for each pass, when all that is read before has been, and may wait, as Read
	// may, until there is something to read or the context ends.
	Open func(ctx context.Context) (io.ReadCloser, error)
}

// Options say how layers are made a file system. Zero values stand for defaults.
type Options struct {
	Limits Limits
	// Progress, if not nil, is told how many bytes of the layers' files have been read, in a goroutine of its own; a second
	// pass starts at 0 again.
	Progress func(done int64)
}

// Layers makes one file system of layers, of which the lowest comes first: dst becomes an ext4 image that can only be mounted
// read-only. Memory: about 1 KiB for each entry besides a few MiB. After an error dst's content is
// rubbish. Errors are *DigestError, *LimitError, *EntryError and those of Open and of files.
func Layers(ctx context.Context, layers []Layer, dst *os.File, o Options) (Stats, error) {
	s := &stack{layers: layers, progress: o.Progress, max: newLimits(o.Limits)}
	return s.flatten(ctx, dst)
}

// stack is layers to flatten.
type stack struct {
	layers   []Layer
	progress func(done int64)
	max      limits
	planned  bool // plan at once

	used     limits
	unpacked int64
	done     int64
}

// errPlan says that one pass is not enough.
var errPlan = errors.New("layers need a plan")

// flatten tries it in one pass, from the top layer down: a name is written when it is met first, and what it hides in lower
// layers is skipped. What one pass cannot know (which of two entries of a layer will be the last; that something hidden
// has another name that is not) needs a pass of its own, which is rare.
func (s *stack) flatten(ctx context.Context, dst *os.File) (Stats, error) {
	err := errPlan
	passes := 1
	if !s.planned {
		err = s.write(ctx, dst, func(w *writer) visitor { return newShadow(w) })
	}
	if errors.Is(err, errPlan) {
		passes = 2
		p := newPlan()
		if err = s.read(ctx, p, len(s.layers), func(n int) int { return n }); err == nil {
			p.finish()
			err = s.write(ctx, dst, func(w *writer) visitor { return &planned{plan: p, writer: w} })
		}
	}
	return Stats{Entries: s.used.entries, Bytes: s.used.bytes, Unpacked: s.unpacked, Passes: passes}, err
}

// visitor is told what the layers hold.
type visitor interface {
	// begin comes before a layer's entries; the lowest layer has number 1.
	begin(layer int) error
	entry(e entry, content io.Reader) error
}

// write makes the image, from the top layer down.
func (s *stack) write(ctx context.Context, dst *os.File, visit func(w *writer) visitor) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := newWriter(ctx, dst, s.max)
	if err != nil {
		return err
	}
	n := len(s.layers)
	return w.close(s.read(ctx, visit(w), n, func(i int) int { return n - 1 - i }))
}

// read goes through n layers in an order.
func (s *stack) read(ctx context.Context, v visitor, n int, order func(i int) int) error {
	s.used, s.unpacked, s.done = limits{maxBytes: s.max.maxBytes, maxEntries: s.max.maxEntries}, 0, 0
	for i := range n {
		l := order(i)
		if err := v.begin(l + 1); err != nil {
			return err
		}
		if err := s.layer(ctx, s.layers[l], v.entry); err != nil {
			return err
		}
	}
	return nil
}

// layer reads one layer: one goroutine unpacks it, this one goes through its tar and checks its digest.
func (s *stack) layer(ctx context.Context, l Layer, f func(e entry, content io.Reader) error) (err error) {
	reading, stop := context.WithCancel(ctx)
	defer stop()
	file, err := l.Open(reading)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	digest := sha256.New()
	limited := &bounded{left: s.max.maxBytes - s.unpacked, err: bytesLimit("bytes unpacked", s.max.maxBytes)}
	err = stream.Unpacked(ctx, &counter{r: file, f: s.advance}, func(r io.Reader) error {
		limited.r = io.TeeReader(r, digest)
		err := readTar(limited, true, &s.used, f)
		if err == nil {
			// What follows the tar's end counts for the digest.
			_, err = io.Copy(io.Discard, limited)
		}
		if err != nil {
			stop() // there may be more to wait for
		}
		return err
	})
	s.unpacked = s.max.maxBytes - limited.left
	if err != nil {
		return fmt.Errorf("layer %s: %w", l.DiffID, err)
	}
	if got := "sha256:" + hex.EncodeToString(digest.Sum(nil)); got != l.DiffID {
		return &DigestError{"unpacked layer", l.DiffID, got}
	}
	return nil
}

// advance counts compressed bytes. It runs in the goroutine that unpacks.
func (s *stack) advance(n int) {
	s.done += int64(n)
	if s.progress != nil {
		s.progress(s.done)
	}
}

// counter tells how much was read.
type counter struct {
	r io.Reader
	f func(n int)
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.f(n)
	return n, err
}
