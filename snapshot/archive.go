package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/klauspost/compress/zstd"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/stage"
)

// An archive is a tar compressed by zstd. Its first entry is the manifest; then each of its files,
// by its path in the snapshot. A file's entry holds its runs of data, in the order in which they
// are in it: the run's offset and its length in bytes, each eight bytes, big endian, and then the
// run. Between them the file has zeros. archive/tar cannot write the sparse forms that tar has, and
// a whole disk or guest would be many times as large.

// Limits of an archive.
const (
	runHeader = 16       // bytes
	block     = 64 << 10 // bytes: zeros are found in blocks of that
	maxWindow = 8 << 20  // bytes that unpacking must remember: what our encoder uses at most
	maxTail   = 1 << 20  // bytes of zeros after the last entry
)

// Export writes the snapshot as an archive. Nobody removes it meanwhile without force: then it ends
// with ErrNotFound. Others wait for nothing, however slow w is. Progress in bytes may be nil.
func (sn *Snapshot) Export(ctx context.Context, w io.Writer, progress func(done, total int64)) (err error) {
	release, err := sn.keep(ctx)
	if err != nil {
		return fmt.Errorf("export snapshot: %w", err)
	}
	defer func() { err = errors.Join(err, release()) }()
	if err := sn.Check(ctx); err != nil {
		return fmt.Errorf("export snapshot: %w", err)
	}
	z, err := zstd.NewWriter(w, zstd.WithWindowSize(maxWindow))
	if err != nil {
		return fmt.Errorf("export snapshot: %w", err)
	}
	err = sn.writeTar(ctx, tar.NewWriter(z), progress)
	if err == nil {
		err = z.Close()
	} else {
		z.Reset(nil) // an end would make what is there look whole
	}
	if isNotExist(err) {
		err = fmt.Errorf("%w any more: it was removed meanwhile", ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("export snapshot %s: %w", sn.ID, err)
	}
	return nil
}

func (sn *Snapshot) writeTar(ctx context.Context, tw *tar.Writer, progress func(done, total int64)) error {
	m := sn.Manifest
	m.Files = maps.Clone(m.Files)
	m.Ephemeral, m.Imported = false, false
	p := tally{ctx: ctx, tell: progress}
	for name, f := range m.Files {
		p.total += f.Size
		if f.Digest == "" {
			var err error
			if f.Digest, _, err = kept.Digest(ctx, sn.Path(name), nil); err != nil {
				return err
			}
			m.Files[name] = f
		}
	}
	text, err := m.encode()
	if err != nil {
		return err
	}
	header := &tar.Header{
		Typeflag: tar.TypeReg, Name: manifestFile, Mode: 0o600, Size: int64(len(text)),
		ModTime: m.Created,
	}
	err = tw.WriteHeader(header)
	if err == nil {
		_, err = tw.Write(text)
	}
	for _, name := range slices.Sorted(maps.Keys(m.Files)) {
		if err != nil {
			return err
		}
		*header = tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o444, ModTime: m.Created}
		err = writeRuns(tw, header, sn.Path(name), &p)
	}
	return errors.Join(err, tw.Close())
}

// writeRuns writes a file's entry.
func writeRuns(tw *tar.Writer, header *tar.Header, path string, p *tally) error {
	f, err := kept.OpenPlain(path)
	if err != nil {
		return err
	}
	defer f.Close()
	all, size, err := runs(p.ctx, f)
	if err != nil {
		return err
	}
	for _, r := range all {
		header.Size += runHeader + r.Len
	}
	if err := tw.WriteHeader(header); err != nil {
		return err
	}
	begun := p.done
	for _, r := range all {
		head := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uint64(r.Off)), uint64(r.Len))
		if _, err := tw.Write(head); err != nil {
			return err
		}
		p.done = begun + r.Off
		if _, err := io.Copy(tw, &counted{io.NewSectionReader(f, r.Off, r.Len), p}); err != nil {
			return err
		}
	}
	p.done = begun + size
	return nil
}

var zeros [block]byte

// runs finds where a file has other bytes than zeros.
func runs(ctx context.Context, f *os.File) (all []stage.Extent, size int64, err error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	data, err := stage.Extents(f, fi.Size())
	if err != nil {
		return nil, 0, err
	}
	buf := make([]byte, block)
	for _, e := range data {
		for off := e.Off; off < e.Off+e.Len; {
			if ctx.Err() != nil {
				return nil, 0, context.Cause(ctx)
			}
			n := min(block, e.Off+e.Len-off)
			if _, err := f.ReadAt(buf[:n], off); err != nil {
				return nil, 0, err
			}
			last := len(all) - 1
			switch {
			case bytes.Equal(buf[:n], zeros[:n]):
			case last >= 0 && all[last].Off+all[last].Len == off:
				all[last].Len += n
			default:
				all = append(all, stage.Extent{Off: off, Len: n})
			}
			off += n
		}
	}
	return all, fi.Size(), nil
}

// tally is how far something is.
type tally struct {
	ctx         context.Context
	done, total int64
	tell        func(done, total int64)
}

// counted is a reader that tells how far it is and ends with its context.
type counted struct {
	r io.Reader
	p *tally
}

func (c *counted) Read(b []byte) (int, error) {
	if c.p.ctx.Err() != nil {
		return 0, context.Cause(c.p.ctx)
	}
	n, err := c.r.Read(b)
	c.p.done += int64(n)
	if c.p.tell != nil {
		c.p.tell(c.p.done, c.p.total)
	}
	return n, err
}

// ImportOptions say how a snapshot is imported. The zero value changes nothing.
type ImportOptions struct {
	Name string // replaces its name; empty: it keeps it
	// Progress is told how far it is, in bytes of the files. It may be nil.
	Progress func(done, total int64)
}

// Import takes an archive in, whoever made it, and has it as a snapshot when all of it is there and
// is what its manifest says. Returns ErrInvalid for what is no archive of a snapshot, ErrDamaged
// where a file is another one, ErrExists where its id or name is taken, and ENOSPC before it would
// fill the disk.
func (s *Store) Import(ctx context.Context, r io.Reader, o ImportOptions) (*Snapshot, error) {
	source := &source{ctx: ctx, r: r}
	z, err := zstd.NewReader(source, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, fmt.Errorf("import snapshot: %w", err)
	}
	defer z.Close()
	sn, err := s.importTar(ctx, z, o)
	switch {
	case err == nil:
		return sn, nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case source.err != nil:
		err = source.err // and not what came of it
	case errors.Is(err, ErrExists):
		err = hint.Add(err, "it may be here already (smartvm snapshot ls); another name is given with --name")
	}
	return nil, fmt.Errorf("import snapshot: %w", err)
}

// source reads an archive and remembers if that fails, to tell this from an archive that is bad.
type source struct {
	ctx context.Context
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	if s.ctx.Err() != nil {
		s.err = context.Cause(s.ctx)
		return 0, s.err
	}
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

func (s *Store) importTar(ctx context.Context, r io.Reader, o ImportOptions) (*Snapshot, error) {
	tr := tar.NewReader(r)
	m, err := firstEntry(tr)
	if err != nil {
		return nil, invalid(err)
	}
	m.Imported = true
	if o.Name != "" {
		m.Name = o.Name
	}
	d, err := s.begin(ctx, m.ID)
	if err != nil {
		return nil, err
	}
	sn, err := d.unpack(ctx, &archive{tr: tr, r: r, m: m, tell: o.Progress})
	if err == nil {
		return sn, nil
	}
	return nil, errors.Join(err, d.Abort())
}

// firstEntry reads the manifest of an archive.
func firstEntry(tr *tar.Reader) (*Manifest, error) {
	header, err := tr.Next()
	if err != nil {
		return nil, err
	}
	if header.Name != manifestFile || header.Typeflag != tar.TypeReg || header.Size > maxManifest {
		return nil, fmt.Errorf("begins with %.64q, not %.64s", header.Name, manifestFile)
	}
	text, err := io.ReadAll(tr)
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(text)
	if err == nil && m.Ephemeral {
		err = errors.New("is of an ephemeral snapshot")
	}
	return m, err
}

// archive is one of which the manifest has been read.
type archive struct {
	tr   *tar.Reader
	r    io.Reader // what tr reads
	m    *Manifest
	tell func(done, total int64)
}

// unpack makes the draft what the archive says.
func (d *Draft) unpack(ctx context.Context, a *archive) (*Snapshot, error) {
	m := a.m
	if err := errors.Join(m.validateSelf(), d.free(m)); err != nil {
		return nil, err
	}
	said := maps.Clone(m.Files)
	p := &tally{ctx: ctx, tell: a.tell}
	for _, f := range said {
		p.total += f.Size
	}
	left := maps.Clone(said)
	for len(left) > 0 {
		header, err := a.tr.Next()
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("ends without %s", slices.Sorted(maps.Keys(left))[0])
		}
		if err != nil {
			return nil, invalid(err)
		}
		f, ok := left[header.Name]
		if !ok || header.Typeflag != tar.TypeReg {
			return nil, invalid(fmt.Errorf("%.64q is no file of it, or comes twice", header.Name))
		}
		delete(left, header.Name)
		if err := d.unpackFile(a.tr, header, f.Size, p); err != nil {
			return nil, fmt.Errorf("%s: %w", header.Name, err)
		}
	}
	if err := atEnd(a.tr, a.r); err != nil {
		return nil, invalid(err)
	}
	seen, err := d.describe(ctx, m, nil)
	if err != nil {
		return nil, err
	}
	for name, f := range said {
		if m.Files[name] != f {
			return nil, &DamagedError{
				ID: m.ID, File: name,
				Reason: fmt.Sprintf("has digest %s, not %s", m.Files[name].Digest, f.Digest),
			}
		}
	}
	return d.publish(ctx, m, seen)
}

// unpackFile makes a file of its runs.
func (d *Draft) unpackFile(tr *tar.Reader, header *tar.Header, size int64, p *tally) (err error) {
	path := filepath.Join(d.path, filepath.FromSlash(header.Name))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := stage.CheckSpace(header.Name, f, header.Size); err != nil {
		return err
	}
	if err := f.Truncate(size); err != nil {
		return err
	}
	begun := p.done
	var head [runHeader]byte
	for at := int64(0); ; {
		if _, err := io.ReadFull(tr, head[:]); err != nil {
			p.done = begun + size
			if errors.Is(err, io.EOF) {
				return nil
			}
			return invalid(err)
		}
		off, n := binary.BigEndian.Uint64(head[:8]), binary.BigEndian.Uint64(head[8:])
		if off < uint64(at) || off > uint64(size) || n == 0 || n > uint64(size)-off {
			return invalid(fmt.Errorf("a run of %d bytes at %d, after %d of %d", n, off, at, size))
		}
		at = int64(off + n)
		p.done = begun + int64(off)
		w := io.NewOffsetWriter(f, int64(off))
		if copied, err := io.CopyN(w, &counted{tr, p}, int64(n)); err != nil {
			var fault *os.PathError
			if errors.As(err, &fault) {
				return err
			}
			return invalid(fmt.Errorf("a run ends after %d of %d bytes: %w", copied, n, err))
		}
	}
}

// atEnd wants the end of the archive, and but for zeros nothing behind it. Only there its last
// checksum is.
func atEnd(tr *tar.Reader, r io.Reader) error {
	header, err := tr.Next()
	if err == nil {
		return fmt.Errorf("%.64q is no file of it, or comes twice", header.Name)
	}
	if !errors.Is(err, io.EOF) {
		return err
	}
	rest, err := io.ReadAll(io.LimitReader(r, maxTail+1))
	if err == nil && (len(rest) > maxTail || len(bytes.Trim(rest, "\x00")) > 0) {
		err = errors.New("goes on after its end")
	}
	return err
}

func invalid(err error) error {
	if errors.Is(err, ErrInvalid) {
		return err
	}
	return fmt.Errorf("%w: the archive: %w", ErrInvalid, err)
}
