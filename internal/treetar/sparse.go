package treetar

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// minHoles is from how many bytes of holes on a file is written without them.
	minHoles = 1 << 20
	// maxPieces bounds the map of a file, which archive/tar reads up to 1 MiB of. The last piece has
	// all that follows.
	maxPieces = 10_000

	tarBlock = 512
	maxOctal = 1<<33 - 1 // of a size
	maxID    = 1<<21 - 1
)

// piece is what a file has between holes.
type piece struct{ at, size int64 }

// pieces finds what a file of so many bytes has. The last piece is where it ends, if with a hole.
func pieces(f *os.File, size int64) (all []piece, err error) {
	for at := int64(0); at < size; {
		from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && from >= size {
			return append(all, piece{size, 0}), nil
		}
		if err != nil {
			return nil, &os.PathError{Op: "seek", Path: f.Name(), Err: err}
		}
		to, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return nil, &os.PathError{Op: "seek", Path: f.Name(), Err: err}
		}
		if to = min(to, size); len(all) == maxPieces-1 {
			to = size
		}
		all = append(all, piece{from, to - from})
		at = to
	}
	return all, nil
}

// withHoles writes a file of which only what is between its holes is in the archive.
// See https://www.gnu.org/software/tar/manual/html_node/PAX-1.html.
func (p *packer) withHoles(f *os.File, h *tar.Header) error {
	all, err := pieces(f, h.Size)
	if err != nil {
		return &unreadError{err}
	}
	var where, records bytes.Buffer
	fmt.Fprintln(&where, len(all))
	size := int64(0)
	for _, part := range all {
		fmt.Fprintf(&where, "%d\n%d\n", part.at, part.size)
		size += part.size
	}
	pad(&where)
	for _, r := range []string{
		"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=" + h.Name, fmt.Sprint("GNU.sparse.realsize=", h.Size),
		fmt.Sprintf("mtime=%d.%09d", h.ModTime.Unix(), h.ModTime.Nanosecond()),
	} {
		n := len(r) + 2 // with a blank and the end of the line, and its own digits
		for len(fmt.Sprint(n)) != n-len(r)-2 {
			n = len(r) + 2 + len(fmt.Sprint(n))
		}
		fmt.Fprintf(&records, "%d %s\n", n, r)
	}
	// archive/tar reads such records, but does not write them.
	block, err := extended(int64(records.Len()))
	if err != nil {
		return err
	}
	pad(&records)
	if err := p.tw.Flush(); err != nil {
		return err
	}
	if _, err := p.w.Write(append(block, records.Bytes()...)); err != nil {
		return err
	}
	// What does not fit into a plain header's numbers does into one of GNU's; records of its own would
	// be in place of those.
	format, total := tar.FormatUSTAR, int64(where.Len())+size
	if total > maxOctal || h.Uid > maxID || h.Gid > maxID {
		format = tar.FormatGNU
	}
	err = p.tw.WriteHeader(&tar.Header{
		Format: format, Typeflag: tar.TypeReg, Name: "GNUSparseFile.0", Mode: h.Mode, Uid: h.Uid, Gid: h.Gid,
		ModTime: h.ModTime.Truncate(1e9),
		Size:    total,
	})
	if err == nil {
		_, err = p.tw.Write(where.Bytes())
	}
	for _, part := range all {
		if err == nil {
			err = p.stream(io.NewSectionReader(f, part.at, part.size), h.Name, part.size)
		}
	}
	return err
}

// pad fills b up to a block.
func pad(b *bytes.Buffer) {
	b.Write(make([]byte, (tarBlock-b.Len()%tarBlock)%tarBlock))
}

// extended is the header of records of so many bytes for the entry that follows.
func extended(size int64) ([]byte, error) {
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(
		&tar.Header{
			Format: tar.FormatUSTAR, Typeflag: tar.TypeReg, Name: "PaxHeaders.0", Mode: 0o644,
			Size: size,
		}); err != nil {
		return nil, err
	}
	// The sum of the header's bytes is six octal digits, at most 0377 * 512.
	block := b.Bytes()
	const kind, sum = 156, 148
	var was int
	if _, err := fmt.Sscanf(string(block[sum:sum+6]), "%o", &was); err != nil {
		return nil, err
	}
	was += tar.TypeXHeader - int(block[kind])
	block[kind] = tar.TypeXHeader
	copy(block[sum:], fmt.Sprintf("%06o", was))
	return block, nil
}
