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
}

// Layer is a tar, packed with gzip, zstd or not at all, with whiteouts of what lower layers have.
type Layer struct {
	DiffID string // "sha256:…", of the tar
	// Open reads it from its beginning. It is called when the layers below have been read, and may
	// wait, as Read may, until there is something to read or the context ends.
	Open func(ctx context.Context) (io.ReadCloser, error)
}

// Options say how layers are made a file system. Zero values stand for defaults.
type Options struct {
	Limits Limits
	// Progress, if not nil, is told how many bytes of the layers' files have been read, in a goroutine
	// of its own.
	Progress func(done int64)
}

// Layers makes one file system of layers, of which the lowest comes first: dst becomes an ext4
// image that can only be mounted read-only. Memory: about 1 KiB for each entry besides a few MiB.
// After an error dst's content is rubbish. Errors are *DigestError, *LimitError, *EntryError and
// those of Open and of files.
func Layers(ctx context.Context, layers []Layer, dst *os.File, o Options) (Stats, error) {
	s := &stack{progress: o.Progress, used: newLimits(o.Limits)}
	err := s.flatten(ctx, layers, dst)
	return Stats{Entries: s.used.entries, Bytes: s.used.bytes, Unpacked: s.unpacked}, err
}

// stack is layers to flatten.
type stack struct {
	progress func(done int64)
	tree     *tree
	used     limits
	unpacked int64
	done     int64
}

func (s *stack) flatten(ctx context.Context, layers []Layer, dst *os.File) (err error) {
	if s.tree, err = newTree(dst, s.used); err != nil {
		return err
	}
	for _, l := range layers {
		s.tree.begin()
		if err := s.layer(ctx, l); err != nil {
			return err
		}
	}
	return s.tree.finish()
}

// layer reads one layer: one goroutine unpacks it, this one goes through its tar and checks its
// digest.
func (s *stack) layer(ctx context.Context, l Layer) (err error) {
	reading, stop := context.WithCancel(ctx)
	defer stop()
	file, err := l.Open(reading)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	digest := sha256.New()
	limited := &bounded{left: s.used.maxBytes - s.unpacked, err: bytesLimit("bytes unpacked", s.used.maxBytes)}
	err = stream.Unpacked(ctx, &counter{r: file, f: s.advance}, func(r io.Reader) error {
		limited.r = io.TeeReader(r, digest)
		err := readTar(limited, true, &s.used, func(e entry, content io.Reader) error {
			return s.tree.entry(ctx, e, content)
		})
		if err == nil {
			// What follows the tar's end counts for the digest.
			_, err = io.Copy(io.Discard, limited)
		}
		if err != nil {
			stop() // there may be more to wait for
		}
		return err
	})
	s.unpacked = s.used.maxBytes - limited.left
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
