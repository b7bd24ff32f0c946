// Package mkfs makes ext4 file systems that can only be mounted read-only. What files hold is
// written when it arrives, one block after the other. Names, inodes and bitmaps follow at the end.
// Nothing is read back. What it knows of the format is from
// https://docs.kernel.org/filesystems/ext4/
package mkfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	blockSize = 4096
	// holeBlocks is how many blocks of zeros in a row become a hole. A shorter hole would save
	// less than what finding its end costs a reader.
	holeBlocks = 16
	// bufferSize is how much is gathered for one write.
	bufferSize = 1 << 20
	// chunkSize is how much of a content is read at once.
	chunkSize = 128 << 10
)

var (
	le    = binary.LittleEndian
	zeros [blockSize]byte
)

// Writer makes one file system. It is not safe for concurrent use.
type Writer struct {
	dst         *os.File
	max         int64    // blocks that the reserved descriptors are enough for
	descriptors int64    // blocks that are reserved for them
	at          int64    // the block that buf begins with
	buf         []byte   // blocks that follow each other and are not written yet
	in          []byte   // what is read of a content
	free        []extent // what Free gave back
	inodes      []*Inode // by number, from 1 on; nil: reserved
	err         error    // the first of a write, after which nothing is written
}

// New starts a file system of at most size bytes in dst, which it empties. After an error of any of
// the Writer's methods, what dst holds is of no use.
func New(dst *os.File, size int64) (*Writer, error) {
	if err := dst.Truncate(0); err != nil {
		return nil, fmt.Errorf("write ext4: %w", err)
	}
	groups := min(ceil(size, maxGroup*blockSize), maxGroups)
	w := &Writer{dst: dst, max: groups * maxGroup, descriptors: ceil(groups, blockSize/descriptorSize)}
	w.at = 1 + w.descriptors
	w.buf, w.in = make([]byte, 0, bufferSize), make([]byte, chunkSize)
	return w, nil
}

// Content is where the content of a file is. The zero value is that of an empty file.
type Content struct {
	size    int64
	blocks  uint32 // that it takes, those of the tree of its extents included
	depth   uint16 // of that tree
	extents []extent
}

// extent is a run of blocks, or a node of a tree of them.
type extent struct {
	first uint32 // of the file's blocks
	count uint32
	at    uint32 // of the file system's blocks
}

// maxExtent is how many blocks an extent may have.
const maxExtent = 1 << 15

// Content writes what a file is to hold. Errors are those of r and of dst.
func (w *Writer) Content(ctx context.Context, r io.Reader) (Content, error) {
	var c Content
	var next, zero uint32 // the file's next block, and how many blocks of zeros come before it
	for {
		n, err := w.fill(r)
		if err != nil && !errors.Is(err, io.EOF) {
			return c, err
		}
		c.size += int64(n)
		for rest := w.in[:n]; len(rest) > 0; rest = rest[blockSize:] {
			if len(rest) < blockSize {
				rest = rest[:blockSize]
				clear(rest[n%blockSize:])
			}
			if bytes.Equal(rest[:blockSize], zeros[:]) {
				zero++
				continue
			}
			if zero >= holeBlocks {
				next, zero = next+zero, 0
			}
			for ; zero > 0; zero-- {
				w.put(&c, next, zeros[:])
				next++
			}
			w.put(&c, next, rest[:blockSize])
			next++
		}
		switch {
		case w.err != nil:
			return c, w.err
		case err != nil:
			return c, nil
		case ctx.Err() != nil:
			return c, context.Cause(ctx)
		}
	}
}

// fill reads as much as there is room for. Its error is io.EOF when r has ended.
func (w *Writer) fill(r io.Reader) (n int, err error) {
	for n < len(w.in) && err == nil {
		var m int
		m, err = r.Read(w.in[n:])
		n += m
	}
	return n, err
}

// Free says that an inode is not needed. Its blocks are free in the file system, and where dst's
// own file system can do it, they take no room there.
func (w *Writer) Free(i *Inode) {
	const punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	blocks := i.Content.extents
	if at := i.Attributes.block; at != 0 {
		blocks = append(blocks, extent{at: at, count: 1})
	}
	for _, e := range blocks {
		if int64(e.at+e.count) > w.at {
			w.flush()
		}
		_ = unix.Fallocate(int(w.dst.Fd()), punch, int64(e.at)*blockSize, int64(e.count)*blockSize)
	}
	w.free = append(w.free, blocks...)
}

// put writes a block of a file.
func (w *Writer) put(c *Content, first uint32, block []byte) {
	at := w.append(block)
	c.blocks++
	if n := len(c.extents) - 1; n >= 0 {
		e := &c.extents[n]
		if e.first+e.count == first && e.at+e.count == at && e.count < maxExtent {
			e.count++
			return
		}
	}
	c.extents = append(c.extents, extent{first, 1, at})
}

// append writes a block behind all others and returns its number.
func (w *Writer) append(block []byte) uint32 {
	if len(w.buf) == cap(w.buf) {
		w.flush()
	}
	at := w.next()
	if at >= w.max && w.err == nil {
		w.err = fmt.Errorf("write ext4: it has more than %d blocks", w.max)
	}
	w.buf = append(w.buf, block...)
	return uint32(at)
}

// next is the number of the next block.
func (w *Writer) next() int64 { return w.at + int64(len(w.buf)/blockSize) }

func (w *Writer) flush() {
	if len(w.buf) > 0 {
		w.write(w.buf, w.at*blockSize)
	}
	w.at, w.buf = w.next(), w.buf[:0]
}

func (w *Writer) write(b []byte, off int64) {
	if w.err != nil {
		return
	}
	if _, err := w.dst.WriteAt(b, off); err != nil {
		w.err = fmt.Errorf("write ext4: %w", err)
	}
}

func ceil[T int | int64](n, unit T) T { return (n + unit - 1) / unit }

// roundUp makes n a multiple of unit.
func roundUp[T int | int64](n, unit T) T { return ceil(n, unit) * unit }
