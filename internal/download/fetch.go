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
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
)

// File is what there is to fetch over HTTP. SHA256, Size and MaxSize are Transfer's.
type File struct {
	URL    string
	SHA256 string
	// ETag is what the server calls the content, if that is known beforehand. A file without SHA256
	// is gone on with in another process only if it has one: path must then be of this content
	// alone.
	ETag          string
	Size, MaxSize int64
}

// Transfer is content, and where it comes from.
type Transfer struct {
	// Name is the content's, in errors.
	Name string
	// SHA256 is the content's, in hexadecimal. Empty where nobody publishes it: what comes is taken
	// as it is.
	SHA256 string
	// Resumable says that what an earlier process has left is of this content. A SHA256 tells by
	// itself.
	Resumable bool
	// Size is the content's, in bytes; 0: unknown. More than MaxSize bytes are never written, and
	// MaxSize is required.
	Size, MaxSize int64
	// Open reads the content from offset on or, where that is not possible, from its start. Its
	// errors are final.
	Open func(ctx context.Context, offset int64) (*Body, error)
	// Elsewhere says that content was wrong, or broke off again and again. It returns whether Open
	// asks another place from now on. It may be nil.
	Elsewhere func(err error) bool
	// Progress is told how many bytes are there, of how many; 0: that is unknown. It is told at the
	// start, of each growth, and before what is there is thrown away. It may be nil.
	Progress func(done, total int64)
}

// Body is content on its way.
type Body struct {
	io.ReadCloser
	Start int64 // its first byte's offset in the content
	Total int64 // the whole content's bytes; 0: unknown
}

func (w *Transfer) check() error {
	sum, err := hex.DecodeString(w.SHA256)
	switch {
	case err != nil || len(sum) != 0 && len(sum) != sha256.Size:
		return fmt.Errorf("download %s: %w: sha256 %.70q", w.Name, fs.ErrInvalid, w.SHA256)
	case w.MaxSize <= 0 || w.Size < 0:
		return fmt.Errorf("download %s: %w: size %d, at most %d", w.Name, fs.ErrInvalid, w.Size, w.MaxSize)
	case w.Size > w.MaxSize:
		return &SizeError{URL: w.Name, Want: w.MaxSize, Got: w.Size}
	}
	return nil
}

// transfer is a Bring. It has its partial file locked.
type transfer struct {
	Transfer
	client *Client
	path   string

	file   *os.File
	hash   hash.Hash
	done   int64 // bytes in file and hash
	high   int64 // the most that done was
	total  int64 // bytes, 0: unknown
	joined bool  // file has parts that may be of different contents
}

// Bring makes a file at path, in a directory of ours. If path has the content already there is
// nothing to do, and Progress is told nothing; what else is there is replaced. Connections that
// break off are made again while something new comes. Errors are *DigestError, *SizeError, and
// those of Open and of the file system.
func (c *Client) Bring(ctx context.Context, path string, want Transfer) (err error) {
	if err := want.check(); err != nil {
		return err
	}
	want.SHA256 = strings.ToLower(want.SHA256)
	if want.Progress == nil {
		want.Progress = func(int64, int64) {}
	}
	t := &transfer{Transfer: want, client: c, path: path}
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
	if t.Size > 0 && fi.Size() != t.Size {
		return false, nil
	}
	if t.SHA256 == "" {
		return true, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, reader{ctx, f}); err != nil {
		return false, fmt.Errorf("download: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)) == t.SHA256, nil
}

// longest is how many bytes there may be.
func (t *transfer) longest() int64 {
	if t.Size > 0 {
		return t.Size
	}
	return t.MaxSize
}

// resume takes what is there as the beginning, if that can be.
func (t *transfer) resume(ctx context.Context) error {
	t.hash, t.total = sha256.New(), t.Size
	fi, err := t.file.Stat()
	switch {
	case err != nil || fi.Size() == 0:
	case fi.Size() > t.longest() || t.SHA256 == "" && !t.Resumable:
		err = t.file.Truncate(0)
	default:
		t.done, err = io.Copy(t.hash, reader{ctx, t.file})
		t.high, t.joined = t.done, t.done > 0
	}
	if err != nil {
		return fmt.Errorf("download: %w", err)
	}
	t.Progress(t.done, t.total)
	return nil
}

// restart throws away what is there.
func (t *transfer) restart() error {
	t.done, t.joined = 0, false
	t.hash.Reset()
	t.Progress(t.done, t.total)
	_, err := t.file.Seek(0, io.SeekStart)
	if err = errors.Join(err, t.file.Truncate(0)); err != nil {
		return fmt.Errorf("download: %w", err)
	}
	return nil
}

// run fetches what is missing, checks it and moves it into place.
func (t *transfer) run(ctx context.Context) error {
	anew := false
	for try := 1; ; try++ {
		high := t.high
		err := t.more(ctx)
		if got := t.sum(); err == nil && t.SHA256 != "" && got != t.SHA256 {
			err = &DigestError{URL: t.Name, Want: t.SHA256, Got: got}
		}
		if t.high > high {
			try = 1
		}
		broken, wrong := errors.As(err, new(*brokenError)), errors.As(err, new(*DigestError))
		switch {
		case err == nil:
			return t.finish()
		case broken && try < maxTries:
			if err := t.client.wait(ctx, try, 0, "err", err); err != nil {
				return t.failed(fmt.Errorf("download: %w", err))
			}
			continue
		case wrong && t.joined && !anew:
			// The content may have changed in between, a crash may have spoilt what was there, or
			// it is of something else.
			anew = true
		case (broken || wrong || errors.As(err, new(*SizeError))) && t.Elsewhere != nil && t.Elsewhere(err):
			anew = false
		default:
			return t.failed(err)
		}
		try = 0
		if !broken {
			t.high = 0
			if err := t.restart(); err != nil {
				return t.failed(err)
			}
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
	useless := errors.As(err, new(*DigestError)) || errors.As(err, new(*SizeError)) || t.done == 0
	if useless || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return t.discard(err)
	}
	return err
}

// discard removes the partial file, and returns err with what goes wrong in that.
func (t *transfer) discard(err error) error { return errors.Join(err, os.Remove(t.file.Name())) }

// more asks for what is missing, and takes what comes.
func (t *transfer) more(ctx context.Context) error {
	if t.done > 0 && (t.done == t.Size || t.sum() == t.SHA256) {
		return nil // it was all there
	}
	body, err := t.Open(ctx, t.done)
	if err != nil {
		return err
	}
	defer body.Close()
	if body.Start != t.done {
		if err := t.restart(); err != nil {
			return err
		}
	}
	t.joined = t.joined || t.done > 0
	t.total = t.Size
	if body.Total > 0 {
		t.total = body.Total
	}
	switch {
	case t.Size > 0 && t.total != t.Size:
		return &SizeError{URL: t.Name, Want: t.Size, Got: t.total}
	case t.total > t.MaxSize:
		return &SizeError{URL: t.Name, Want: t.MaxSize, Got: t.total}
	case t.total > t.done:
		// A disk that is too small is better noticed before it is full. Not all file systems can.
		err := unix.Fallocate(int(t.file.Fd()), unix.FALLOC_FL_KEEP_SIZE, t.done, t.total-t.done)
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return &fs.PathError{Op: "download to", Path: t.path, Err: err}
		}
	}
	return t.receive(body)
}

// receive appends a body to the file.
func (t *transfer) receive(body io.Reader) error {
	buf := make([]byte, 128<<10)
	for {
		n, err := body.Read(buf)
		if t.done+int64(n) > t.longest() {
			return &SizeError{URL: t.Name, Want: t.longest(), Got: -1}
		}
		if n > 0 {
			if _, err := t.file.Write(buf[:n]); err != nil {
				return fmt.Errorf("download: %w", err)
			}
			t.hash.Write(buf[:n])
			t.done += int64(n)
			t.high = max(t.high, t.done)
			t.Progress(t.done, t.total)
		}
		if err == io.EOF && t.done < t.total {
			err = io.ErrUnexpectedEOF
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return &brokenError{t.Name, err}
		}
	}
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
