package flatten

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"path"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"

	"push.rocks/smartvm/internal/stream"
)

// disk leaves room for what the file system itself needs: an inode and a directory entry of each file, and the rest of its last
// block.
func (l limits) disk() int64 { return l.maxBytes + l.maxEntries*(4096+512) }

// maxLinks is how many names ext4 lets a file have, and how many directories one may hold with the two names that each has besides.
const maxLinks = 65000

// writer makes an ext4 image of entries, each of which must have a name of its own; a directory may come twice, the second time
// with its metadata. The image is made in a goroutine of its own, from a tar.
type writer struct {
	tar  *tar.Writer
	pipe *stream.Pipe
	done chan struct{}
	err  error // of the goroutine, once done is closed
	buf  []byte
	seed maphash.Seed
	// links counts, by a hash of a name, the names of a file besides its first, and the directories in a directory.
	links map[uint64]int
}

// newWriter starts to write to dst, which is emptied first. close must be called.
func newWriter(ctx context.Context, dst *os.File, l limits) (*writer, error) {
	if err := dst.Truncate(0); err != nil {
		return nil, fmt.Errorf("write ext4: %w", err)
	}
	p := stream.NewPipe(ctx)
	w := &writer{tar: tar.NewWriter(p), pipe: p, done: make(chan struct{}), buf: make([]byte, 64<<10)}
	w.seed, w.links = maphash.MakeSeed(), map[uint64]int{}
	go func() {
		defer close(w.done)
		h := &holes{file: dst}
		w.err = tar2ext4.ConvertTarToExt4(p, h, tar2ext4.MaximumDiskSize(l.disk()))
		if w.err == nil {
			w.err = errors.Join(dst.Truncate(h.off), padBitmaps(dst))
		}
		if w.err != nil {
			w.err = fmt.Errorf("write ext4: %w", w.err)
		}
		p.Stop(w.err)
	}()
	return w, nil
}

// put adds an entry whose header has been through clean. A file's content is read from r.
func (w *writer) put(h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeDir {
		if err := w.directory(path.Clean(h.Name)); err != nil {
			return err
		}
	}
	if err := w.tar.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	// Hiding what else both are keeps io.CopyBuffer to its buffer.
	_, err := io.CopyBuffer(struct{ io.Writer }{w.tar}, struct{ io.Reader }{r}, w.buf)
	return err
}

// implied adds a directory that no entry described yet.
func (w *writer) implied(name string) error {
	return w.put(&tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(0, 0)}, nil)
}

// directory counts a directory for the one that it is in, once.
func (w *writer) directory(name string) error {
	key := maphash.String(w.seed, name)
	if _, there := w.links[key]; there {
		return nil
	}
	w.links[key] = 0
	if name == "." {
		return nil
	}
	in := path.Dir(name)
	key = maphash.String(w.seed, in)
	if w.links[key]++; w.links[key] > maxLinks-3 { // lost+found is one more in the root
		return &EntryError{Name: short(in), Reason: fmt.Sprintf(
			"more than %d directories in one, which ext4 cannot have here: spread them over several, or leave some out", maxLinks-3)}
	}
	return nil
}

// link adds another name of a file.
func (w *writer) link(name, old string) error {
	key := maphash.String(w.seed, old)
	if w.links[key]++; w.links[key] > maxLinks-1 {
		return &EntryError{Name: short(old), Reason: fmt.Sprintf(
			"more than %d hard links to one file, which ext4 cannot have: make some of them copies, or leave some out", maxLinks)}
	}
	return w.put(&tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: old}, nil)
}

// close finishes the image if all went well so far, and waits for the goroutine.
func (w *writer) close(err error) error {
	if err == nil {
		err = w.tar.Close()
	}
	w.pipe.Finish(err)
	<-w.done
	if err != nil {
		// The goroutine's error is ours or the other way round.
		return err
	}
	return w.err
}

// padBitmaps marks what is left of each inode bitmap's block as used, which e2fsck wants and tar2ext4 does not do.
func padBitmaps(f *os.File) error {
	const block, super, descriptor = 4096, 1024, 32
	head := make([]byte, 44)
	if _, err := f.ReadAt(head, super); err != nil {
		return err
	}
	inodes, perGroup := binary.LittleEndian.Uint32(head), binary.LittleEndian.Uint32(head[40:])
	if perGroup == 0 || perGroup > 8*block {
		return fmt.Errorf("%d inodes in a group", perGroup)
	}
	padding := bytes.Repeat([]byte{0xff}, block-int(perGroup/8))
	for g := range inodes / perGroup {
		at := head[:4]
		if _, err := f.ReadAt(at, block+int64(g)*descriptor+4); err != nil {
			return err
		}
		if _, err := f.WriteAt(padding, int64(binary.LittleEndian.Uint32(at))*block+int64(perGroup/8)); err != nil {
			return err
		}
	}
	return nil
}

// holes writes to a file and leaves out blocks of zeros. The file must be empty at first; at the end, it is to be cut to off.
type holes struct {
	file *os.File
	off  int64
	end  int64 // where data ends; before it, zeros are written too
}

const holeSize = 4096

// zeros is what a hole reads as.
var zeros [holeSize]byte

func (h *holes) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		size, hole := h.run(p[n:])
		if !hole {
			size, err = h.file.WriteAt(p[n:n+size], h.off)
			h.end = max(h.end, h.off+int64(size))
		}
		n += size
		h.off += int64(size)
	}
	return n, err
}

// run measures what p begins with: a hole's bytes or others.
func (h *holes) run(p []byte) (size int, hole bool) {
	for size < len(p) {
		n := min(len(p)-size, holeSize-int((h.off+int64(size))%holeSize))
		zero := n == holeSize && h.off+int64(size) >= h.end && bytes.Equal(p[size:size+n], zeros[:])
		if size > 0 && zero != hole {
			return size, hole
		}
		hole = zero
		size += n
	}
	return size, hole
}

func (h *holes) Read(p []byte) (int, error) {
	n, err := h.file.ReadAt(p, h.off)
	h.off += int64(n)
	return n, err
}

func (h *holes) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
		h.off = offset
	case io.SeekCurrent:
		h.off += offset
	default:
		return 0, errors.ErrUnsupported
	}
	return h.off, nil
}
