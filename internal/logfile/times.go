package logfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// TimesSuffix is added to the name of a log's file, or of its older half, for the times at which it
// was written.
const TimesSuffix = ".times"

// The times are marks: so far had the file come at that moment. What was written between two marks
// was written within an interval after the first; or, if that is thinned, any time before the
// second.
const (
	markSize     = 16 // bytes: an offset, thinned or not, and nanoseconds since 1970, big-endian
	thinned      = 1 << 63
	maxMarks     = 4096
	markInterval = 100 * time.Millisecond
)

type mark struct {
	offset  int64
	at      time.Time
	thinned bool
}

// times notes when a file is written.
type times struct {
	path string
	f    *os.File // nil until there is something to note: of most logs there is nothing
	n    int
	last time.Time
}

// open goes on with the times of a file that may have some.
func (t *times) open() (err error) {
	if t.f, err = os.OpenFile(t.path+TimesSuffix, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
		return err
	}
	fi, err := t.f.Stat()
	if err != nil {
		return err
	}
	t.n = int(min(fi.Size()/markSize, maxMarks))
	return t.f.Truncate(int64(t.n) * markSize) // a mark that was cut off
}

func (t *times) close() error {
	if t.f == nil {
		return nil
	}
	return t.f.Close()
}

// note marks that the file had so many bytes now.
func (t *times) note(offset int64) error {
	now := time.Now()
	if now.Sub(t.last) < markInterval && !now.Before(t.last) {
		return nil
	}
	if t.f == nil {
		if err := t.open(); err != nil {
			return err
		}
	}
	if t.n == maxMarks {
		if err := t.thin(); err != nil {
			return err
		}
	}
	record := binary.BigEndian.AppendUint64(nil, uint64(offset))
	_, err := t.f.Write(binary.BigEndian.AppendUint64(record, uint64(now.UnixNano())))
	t.n, t.last = t.n+1, now
	return err
}

// thin keeps every other mark.
func (t *times) thin() error {
	data := make([]byte, maxMarks*markSize)
	n, err := t.f.ReadAt(data, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	var kept []byte
	for at := 0; at+markSize <= n; at += 2 * markSize {
		data[at] |= thinned >> 56
		kept = append(kept, data[at:at+markSize]...)
	}
	t.n = len(kept) / markSize
	if err := t.f.Truncate(0); err != nil {
		return err
	}
	_, err = t.f.Write(kept)
	return err
}

// rotate begins anew: what was noted is of the older half.
func (t *times) rotate() error {
	err := os.Rename(t.path+TimesSuffix, t.path+Suffix+TimesSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	err = errors.Join(err, t.close())
	*t = times{path: t.path}
	return err
}

// readTimes returns a file's marks; nil if there are none, or no sense is in them.
func readTimes(path string) (marks []mark) {
	f, err := open(path + TimesSuffix)
	if err != nil {
		return nil
	}
	defer f.Close()
	data, _ := io.ReadAll(io.LimitReader(f, maxMarks*markSize))
	for ; len(data) >= markSize; data = data[markSize:] {
		offset := binary.BigEndian.Uint64(data)
		m := mark{int64(offset &^ thinned), time.Unix(0, int64(binary.BigEndian.Uint64(data[8:]))), offset&thinned != 0}
		if fi, err := os.Stat(path); err != nil || m.offset > fi.Size() || len(marks) > 0 &&
			m.offset < marks[len(marks)-1].offset {
			return nil
		}
		marks = append(marks, m)
	}
	return marks
}

// since returns from where on a file was written at that time or later; where nobody knows, its
// beginning.
func since(path string, at time.Time) int64 {
	marks := readTimes(path)
	if len(marks) == 0 {
		return 0
	}
	i := slices.IndexFunc(marks, func(m mark) bool { return !m.at.Before(at) })
	if i < 0 {
		i = len(marks)
	}
	if i > 0 && (marks[i-1].thinned || marks[i-1].at.Add(markInterval).After(at)) {
		i--
	}
	if i == len(marks) {
		return math.MaxInt64
	}
	return marks[i].offset
}

// OpenSince is Open of what was written at a time or later, from the beginning of a line on. Only
// CreateTimed's logs know; others are read from their beginning.
func OpenSince(path string, at time.Time) (*Reader, error) {
	r := Open(path)
	for _, half := range []struct {
		f    *os.File
		path string
	}{{r.older, path + Suffix}, {r.f, path}} {
		if half.f == nil {
			continue
		}
		if err := seekLine(half.f, since(half.path, at)); err != nil {
			return nil, errors.Join(fmt.Errorf("read log: %w", err), r.Close())
		}
	}
	return r, nil
}

// maxLine bounds how far back the beginning of a line is looked for.
const maxLine = 4 << 10

// seekLine leads to the beginning of the line at an offset.
func seekLine(f *os.File, offset int64) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if offset >= fi.Size() {
		_, err := f.Seek(0, io.SeekEnd)
		return err
	}
	from := max(offset-maxLine, 0)
	before := make([]byte, offset-from)
	if _, err := f.ReadAt(before, from); err != nil {
		return err
	}
	for len(before) > 0 && before[len(before)-1] != '\n' {
		before = before[:len(before)-1]
	}
	if from += int64(len(before)); len(before) == 0 && offset > maxLine {
		from = offset // a line without end begins here
	}
	_, err = f.Seek(from, io.SeekStart)
	return err
}

// Remove removes logs in a directory, with all that belongs to them. Mostly there are none, which
// one look tells.
func Remove(dir string, names ...string) error {
	there, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("remove logs: %w", err)
	}
	var errs []error
	for _, e := range there {
		if slices.Contains(names, strings.TrimSuffix(strings.TrimSuffix(e.Name(), TimesSuffix), Suffix)) {
			errs = append(errs, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
