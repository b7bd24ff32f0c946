package release

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/download"
)

// Limits of what a server can make us take. Releases are a tenth of each.
const (
	maxArchive  = 512 << 20 // bytes
	maxUnpacked = 2 << 30   // bytes of all that is in it
	maxProgram  = 256 << 20 // bytes
	maxMembers  = 10_000
	maxSums     = 64 << 10 // bytes of a checksum file
)

// ArchiveError says that an archive, or the list of its digest, is not what a release has.
type ArchiveError struct {
	Name   string // of the archive
	Reason string
}

func (e *ArchiveError) Error() string { return e.Name + ": " + e.Reason }

// install fetches and unpacks. The caller has the working directory locked.
func (s *Store) install(ctx context.Context, version string) error {
	name := fmt.Sprintf("firecracker-%s-%s.tgz", version, s.opts.Arch)
	work := filepath.Join(s.opts.Dir, workDir)
	archive := filepath.Join(work, name)
	if err := tidy(work, name, name+download.PartialSuffix); err != nil {
		return err
	}
	url := s.opts.URL + "/download/" + version + "/" + name
	sums, err := s.opts.client.Get(ctx, url+".sha256.txt", maxSums)
	if err != nil {
		return err
	}
	digest, err := findDigest(sums, name)
	if err != nil {
		return err
	}
	f := download.File{URL: url, SHA256: digest, MaxSize: maxArchive}
	err = s.opts.client.Fetch(ctx, f, archive, func(done, total int64) { s.opts.Progress(name, done, total) })
	if err != nil {
		return err
	}
	dir := filepath.Join(work, version)
	b := Binary{Version: version, Source: url}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := s.extract(ctx, archive, dir, &b); err != nil {
		if ctx.Err() == nil {
			err = errors.Join(err, os.Remove(archive)) // another time will not make it better
		}
		return errors.Join(err, os.RemoveAll(dir))
	}
	if err := errors.Join(writeRecord(dir, b), os.Chmod(dir, 0o755)); err != nil {
		return err
	}
	if err := s.replace(dir, version); err != nil {
		return err
	}
	return os.Remove(archive)
}

// replace moves dir, which is on disk, to where the version is to be.
func (s *Store) replace(dir, version string) error {
	if _, err := os.Lstat(filepath.Join(s.opts.Dir, version)); err == nil {
		if err := s.setAside(version); err != nil {
			return err
		}
	}
	if err := os.Rename(dir, filepath.Join(s.opts.Dir, version)); err != nil {
		return err
	}
	return atomicfile.SyncDir(s.opts.Dir)
}

// tidy removes from the working directory what others left there that died, but for what can be
// gone on with.
func tidy(work string, keep ...string) error {
	entries, err := os.ReadDir(work)
	if err != nil {
		return err
	}
next:
	for _, e := range entries {
		for _, name := range keep {
			if e.Name() == name {
				continue next
			}
		}
		if err := os.RemoveAll(filepath.Join(work, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// findDigest finds a file's in the output of sha256sum.
func findDigest(sums []byte, name string) (string, error) {
	lines := bufio.NewScanner(bytes.NewReader(sums))
	for lines.Scan() {
		digest, rest, ok := strings.Cut(lines.Text(), " ")
		file := strings.TrimRight(strings.TrimLeft(rest, " *"), "\r")
		sum, err := hex.DecodeString(digest)
		if ok && err == nil && len(sum) == sha256.Size && path.Base(file) == name {
			return strings.ToLower(digest), nil
		}
	}
	return "", &ArchiveError{name, "its digest is not in the release's checksum file"}
}

// extract writes the two programs into dir, and their digests into b.
func (s *Store) extract(ctx context.Context, archive, dir string, b *Binary) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	name := filepath.Base(archive)
	bad := func(format string, args ...any) error { return &ArchiveError{name, fmt.Sprintf(format, args...)} }
	packed := &counter{ctx: ctx, r: f, left: fi.Size(), tell: func(done int64) {
		s.opts.Progress("unpack", done, fi.Size())
	}}
	unzipped, err := gzip.NewReader(packed)
	if err != nil {
		return bad("%v", err)
	}
	limited := &counter{ctx: ctx, r: unzipped, left: s.unpack}
	members := tar.NewReader(limited)
	want := map[string]*string{"firecracker": &b.FirecrackerSHA256, "jailer": &b.JailerSHA256}
	for n := 0; len(want) > 0; n++ {
		h, err := members.Next()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, io.EOF):
			return bad("firecracker or jailer is not in it")
		case err != nil:
			return bad("%v", err)
		case n >= maxMembers:
			return bad("more than %d files are in it", maxMembers)
		case !filepath.IsLocal(h.Name):
			return bad("it has %.200q, which leads out of it", h.Name)
		}
		program, ok := strings.CutSuffix(path.Base(h.Name), "-"+b.Version+"-"+s.opts.Arch)
		digest, wanted := want[program]
		if !ok || !wanted || path.Dir(path.Clean(h.Name)) != "release-"+b.Version+"-"+s.opts.Arch {
			continue
		}
		if h.Typeflag != tar.TypeReg || h.Size <= 0 || h.Size > maxProgram {
			return bad("%.200q is no program: type %q, %d bytes", h.Name, h.Typeflag, h.Size)
		}
		*digest, err = writeProgram(filepath.Join(dir, program), members)
		if errors.Is(err, errUnpack) && ctx.Err() == nil {
			return bad("%v", err)
		}
		if err != nil {
			return err
		}
		delete(want, program)
	}
	return nil
}

var errUnpack = errors.New("unpack")

// writeProgram stores what r gives, and returns its digest. What is wrong with r is errUnpack.
func writeProgram(path string, r io.Reader) (digest string, err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	from := &source{r: r}
	_, err = io.Copy(io.MultiWriter(f, h), from)
	if from.err != nil {
		err = fmt.Errorf("%w: %w", errUnpack, from.err)
	}
	// The jailer's VMM is another user.
	return hex.EncodeToString(h.Sum(nil)), errors.Join(err, f.Chmod(0o755), f.Sync(), f.Close())
}

// source remembers what went wrong in reading, to tell it from what goes wrong in writing.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// counter bounds and watches a reader.
type counter struct {
	ctx        context.Context
	r          io.Reader
	done, left int64
	tell       func(done int64)
}

func (c *counter) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.r.Read(p)
	c.done += int64(n)
	if c.left -= int64(n); c.left < 0 {
		return 0, errors.New("it unpacks to more than a release has")
	}
	if c.tell != nil {
		c.tell(c.done)
	}
	return n, err
}

func fileDigest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), err
}
