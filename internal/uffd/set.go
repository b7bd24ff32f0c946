package uffd

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"push.rocks/smartvm/internal/atomicfile"
)

// Set is a set of pages of a memory file.
type Set struct {
	PageSize int64   // bytes
	Size     int64   // bytes of the file
	Ranges   []Range // ascending, apart
}

// Range is a run of pages.
type Range struct{ First, Pages int64 }

// Pages is how many the set has.
func (s *Set) Pages() (n int64) {
	for _, r := range s.Ranges {
		n += r.Pages
	}
	return n
}

// Limits of a set's file.
const (
	setHeader  = "smartvm pages 1"
	maxSetFile = 8 << 20 // bytes
)

// ErrSet says that a file holds no set of pages.
var ErrSet = errors.New("no set of pages")

// WriteSet replaces a file with a set, as text: a line that says what it is, one with the size of a
// page and that of the file, and one for each range, its first page and how many.
func WriteSet(path string, s *Set) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s\n%d %d\n", setHeader, s.PageSize, s.Size)
	for _, r := range s.Ranges {
		fmt.Fprintf(&b, "%d %d\n", r.First, r.Pages)
	}
	if b.Len() > maxSetFile {
		return fmt.Errorf("write %s: %d ranges are too many", path, len(s.Ranges))
	}
	return atomicfile.Write(path, b.Bytes(), 0o600)
}

// ReadSet reads a set. Returns ErrSet for what is none.
func ReadSet(path string) (*Set, error) {
	data, err := atomicfile.Read(path, maxSetFile)
	if err != nil {
		return nil, err
	}
	s, err := parseSet(data)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return s, nil
}

func parseSet(data []byte) (*Set, error) {
	if len(data) > maxSetFile {
		return nil, fmt.Errorf("%w: larger than %d bytes", ErrSet, maxSetFile)
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	if !lines.Scan() || lines.Text() != setHeader {
		return nil, fmt.Errorf("%w: it does not begin with %q", ErrSet, setHeader)
	}
	s := &Set{}
	var err error
	if s.PageSize, s.Size, err = twoNumbers(lines); err != nil {
		return nil, err
	}
	if !validPageSize(s.PageSize) || s.Size%s.PageSize != 0 {
		return nil, fmt.Errorf("%w: %d bytes in pages of %d", ErrSet, s.Size, s.PageSize)
	}
	for next := int64(0); ; {
		first, pages, err := twoNumbers(lines)
		if errors.Is(err, io.EOF) {
			return s, nil
		}
		if err != nil {
			return nil, err
		}
		if first < next || pages == 0 || first > s.Size/s.PageSize || pages > s.Size/s.PageSize-first {
			return nil, fmt.Errorf("%w: %d pages at %d", ErrSet, pages, first)
		}
		s.Ranges = append(s.Ranges, Range{first, pages})
		next = first + pages
	}
}

// twoNumbers reads a line of two numbers, neither of them negative; io.EOF where there is none.
func twoNumbers(lines *bufio.Scanner) (a, b int64, err error) {
	if !lines.Scan() {
		if lines.Err() != nil {
			return 0, 0, fmt.Errorf("%w: %w", ErrSet, lines.Err())
		}
		return 0, 0, fmt.Errorf("%w: %w", ErrSet, io.EOF)
	}
	if n, err := fmt.Sscanf(lines.Text(), "%d %d", &a, &b); n != 2 || err != nil || a < 0 || b < 0 ||
		fmt.Sprintf("%d %d", a, b) != lines.Text() {
		return 0, 0, fmt.Errorf("%w: a line that is no two numbers", ErrSet)
	}
	return a, b, nil
}

func validPageSize(n int64) bool { return n == 4<<10 || n == 2<<20 }

// bitmap is a set of pages that changes.
type bitmap []uint64

func newBitmap(pages int64) bitmap { return make(bitmap, (pages+63)/64) }

func (b bitmap) has(i int64) bool { return b[i/64]&(1<<(i%64)) != 0 }
func (b bitmap) add(i int64)      { b[i/64] |= 1 << (i % 64) }
func (b bitmap) drop(i int64)     { b[i/64] &^= 1 << (i % 64) }

// ranges are the runs of pages in it.
func (b bitmap) ranges(pages int64) (all []Range) {
	for i := int64(0); i < pages; i++ {
		switch last := len(all) - 1; {
		case i%64 == 0 && b[i/64] == 0:
			i += 63
		case !b.has(i):
		case last >= 0 && all[last].First+all[last].Pages == i:
			all[last].Pages++
		default:
			all = append(all, Range{i, 1})
		}
	}
	return all
}
