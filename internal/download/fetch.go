package download

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
)

// File is what there is to fetch.
type File struct {
	URL string
	// SHA256 is the content's, in hexadecimal. Empty where nobody publishes it: what comes is taken as it is.
	SHA256 string
	// ETag is what the server calls the content, if that is known beforehand. A file without SHA256 is gone on with in
	// another process only if it has one: path must then be of this content alone.
	ETag string
	// Size is the content's, in bytes; 0: unknown. More than MaxSize bytes are never written, and MaxSize is required.
	Size, MaxSize int64
}

func (f *File) check() error {
	sum, err := hex.DecodeString(f.SHA256)
	switch {
	case err != nil || len(sum) != 0 && len(sum) != sha256.Size:
		return fmt.Errorf("download %s: %w: sha256 %.70q", redact(f.URL), fs.ErrInvalid, f.SHA256)
	case f.MaxSize <= 0 || f.Size < 0:
		return fmt.Errorf("download %s: %w: size %d, at most %d", redact(f.URL), fs.ErrInvalid, f.Size, f.MaxSize)
	case f.Size > f.MaxSize:
		return &SizeError{URL: redact(f.URL), Want: f.MaxSize, Got: f.Size}
	}
	return nil
}

// Fetch brings f to path, in a directory of ours. If path has that content already there is nothing to do; what else is
// there is replaced. Progress, unless it is nil, is told how many bytes are there, of how many; 0: that is unknown. Errors
// are *StatusError, *DigestError, *SizeError, and those of the network and of the file system.
func (c *Client) Fetch(ctx context.Context, f File, path string, progress func(done, total int64)) (err error) {
	if err := f.check(); err != nil {
		return err
	}
	f.SHA256 = strings.ToLower(f.SHA256)
	if progress == nil {
		progress = func(int64, int64) {}
	}
	t := &transfer{client: c, want: f, path: path, progress: progress, etag: f.ETag}
	if ok, err := t.there(ctx); ok || err != nil {
		return err
	}
	if t.file, err = OpenPartial(ctx, path, func() {
		if c.Waiting != nil {
			c.Waiting(path)
		}
	}); err != nil {
		return fmt.Errorf("download: %w", err)
	}
	// Closing lets go of the lock, so it is last.
	defer func() { err = errors.Join(err, t.file.Close()) }()
	if ok, err := t.there(ctx); err != nil {
		return err
	} else if ok {
		return t.discard(nil) // another has brought it meanwhile
	}
	if err := t.resume(ctx); err != nil {
		return err
	}
	return t.run(ctx)
}

// transfer is a Fetch. It has its partial file locked.
type transfer struct {
	client   *Client
	want     File
	path     string
	progress func(done, total int64)

	file    *os.File
	hash    hash.Hash
	done    int64  // bytes in file and hash
	high    int64  // the most that done was
	total   int64  // bytes, 0: unknown
	etag    string // of what is in file, "" for unknown
	foreign bool   // file has bytes that another process wrote
}

// there says whether path has the wanted content.
func (t *transfer) there(ctx context.Context) (bool, error) {
	f, err := os.OpenFile(t.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("download: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return false, errors.Join(fmt.Errorf("download: %w: %s is no regular file", fs.ErrInvalid, t.path), err)
	}
	if t.want.Size > 0 && fi.Size() != t.want.Size {
		return false, nil
	}
	if t.want.SHA256 == "" {
		return true, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, reader{ctx, f}); err != nil {
		return false, fmt.Errorf("download: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)) == t.want.SHA256, nil
}

// resume takes what is there as the beginning, if that can be.
func (t *transfer) resume(ctx context.Context) error {
	t.total = t.want.Size
	fi, err := t.file.Stat()
	if err != nil {
		return fmt.Errorf("download: %w", err)
	}
	longest := t.want.MaxSize
	if t.want.Size > 0 {
		longest = t.want.Size
	}
	if fi.Size() == 0 || fi.Size() > longest || t.want.SHA256 == "" && t.want.ETag == "" {
		return t.restart()
	}
	t.hash, t.foreign = sha256.New(), true
	t.done, err = io.Copy(t.hash, reader{ctx, t.file})
	t.high = t.done
	if err != nil {
		return fmt.Errorf("download: %w", err)
	}
	return nil
}

// restart forgets what is there.
func (t *transfer) restart() error {
	t.hash, t.done, t.foreign = sha256.New(), 0, false
	_, err := t.file.Seek(0, io.SeekStart)
	if err = errors.Join(err, t.file.Truncate(0)); err != nil {
		return fmt.Errorf("download: %w", err)
	}
	return nil
}

// run fetches what is missing, checks it and moves it into place.
func (t *transfer) run(ctx context.Context) error {
	for {
		if whole := t.done > 0 && (t.done == t.want.Size || t.sum() == t.want.SHA256); !whole {
			if err := t.client.retry(ctx, func() (bool, error) { return t.try(ctx) }); err != nil {
				return t.failed(err)
			}
		}
		switch {
		case t.want.Size > 0 && t.done != t.want.Size:
			return t.discard(&SizeError{URL: redact(t.want.URL), Want: t.want.Size, Got: t.done})
		case t.want.SHA256 == "" || t.sum() == t.want.SHA256:
			return t.finish()
		case !t.foreign:
			return t.discard(&DigestError{URL: redact(t.want.URL), Want: t.want.SHA256, Got: t.sum()})
		}
		// What was there may be of something else, or a crash has spoilt it.
		if err := t.restart(); err != nil {
			return err
		}
	}
}

// sum is the digest of what is there.
func (t *transfer) sum() string { return hex.EncodeToString(t.hash.Sum(nil)) }

func (t *transfer) finish() error {
	if err := t.file.Sync(); err != nil {
		return t.failed(fmt.Errorf("download: %w", err))
	}
	if err := os.Rename(t.file.Name(), t.path); err != nil {
		return fmt.Errorf("download: %w", err)
	}
	return atomicfile.SyncDir(filepath.Dir(t.path))
}

// failed keeps what is there for another time, unless it is of no use or has filled the disk.
func (t *transfer) failed(err error) error {
	if errors.As(err, new(*SizeError)) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || t.done == 0 {
		return t.discard(err)
	}
	return err
}

// discard removes the partial file, and returns err with what goes wrong in that.
func (t *transfer) discard(err error) error { return errors.Join(err, os.Remove(t.file.Name())) }

// try makes one request for what is missing. News are bytes that never were there before.
func (t *transfer) try(ctx context.Context) (news bool, err error) {
	header := http.Header{}
	if t.done > 0 {
		header.Set("Range", fmt.Sprintf("bytes=%d-", t.done))
		if strings.HasPrefix(t.etag, `"`) { // a weak one does not promise the same bytes
			header.Set("If-Range", t.etag)
		}
	}
	resp, err := t.client.do(ctx, http.MethodGet, t.want.URL, header)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusPartialContent && t.done > 0 && rangeStart(resp) == t.done:
	case resp.StatusCode == http.StatusOK:
		if err := t.restart(); err != nil {
			return false, err
		}
	case t.done > 0 && (resp.StatusCode == http.StatusPartialContent || resp.StatusCode == http.StatusRequestedRangeNotSatisfiable):
		// The server does not have what we have a part of.
		if err := t.restart(); err != nil {
			return false, err
		}
		return false, &transportError{redact(t.want.URL), errors.New("the server does not have the part that is missing")}
	default:
		return false, statusError(resp, t.want.URL)
	}
	t.etag = resp.Header.Get("ETag")
	if resp.ContentLength >= 0 {
		t.total = t.done + resp.ContentLength
		if t.want.Size > 0 && t.total != t.want.Size {
			return false, &SizeError{URL: redact(t.want.URL), Want: t.want.Size, Got: t.total}
		}
		if t.total > t.want.MaxSize {
			return false, &SizeError{URL: redact(t.want.URL), Want: t.want.MaxSize, Got: t.total}
		}
	}
	if t.total > t.done {
		// A disk that is too small is better noticed before it is full. Not all file systems can.
		err := unix.Fallocate(int(t.file.Fd()), unix.FALLOC_FL_KEEP_SIZE, t.done, t.total-t.done)
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return false, &fs.PathError{Op: "download to", Path: t.path, Err: err}
		}
	}
	before := t.high
	err = t.receive(resp.Body)
	return t.high > before, err
}

// receive appends a body to the file.
func (t *transfer) receive(body io.Reader) error {
	buf := make([]byte, 128<<10)
	for {
		n, err := body.Read(buf)
		if t.done+int64(n) > t.want.MaxSize {
			return &SizeError{URL: redact(t.want.URL), Want: t.want.MaxSize, Got: -1}
		}
		if n > 0 {
			if _, err := t.file.Write(buf[:n]); err != nil {
				return fmt.Errorf("download: %w", err)
			}
			t.hash.Write(buf[:n])
			t.done += int64(n)
			t.high = max(t.high, t.done)
			t.progress(t.done, t.total)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// rangeStart is where a part begins, or -1.
func rangeStart(resp *http.Response) int64 {
	text, _ := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes ")
	text, _, _ = strings.Cut(text, "-")
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return -1
	}
	return n
}

// reader ends with its context.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}
