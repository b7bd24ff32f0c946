package ext4

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// Limits bound what is read.
type Limits struct {
	Bytes   int64 // of all files, holes included
	Entries int64
}

// ErrTooLarge says that a file system holds more than its limits.
var ErrTooLarge = errors.New("too large")

const (
	maxPath   = 4095    // bytes
	maxTarget = 4096    // bytes of a symbolic link's
	maxDir    = 1 << 30 // bytes of one directory's entries
)

// Kinds of files, in their modes.
const (
	kindMask   = 0xf000
	kindFIFO   = 0x1000
	kindChar   = 0x2000
	kindDir    = 0x4000
	kindBlock  = 0x6000
	kindFile   = 0x8000
	kindLink   = 0xa000
	kindSocket = 0xc000
)

// Tar writes all files, directories before what is in them and names in order, so that the same
// file system gives the same bytes. Sockets are left out, ACLs too, and an empty lost+found.
// Extended attributes are as GNU tar has them. Errors are ErrFormat, ErrTooLarge, and those of w.
func (f *FS) Tar(ctx context.Context, w *tar.Writer, l Limits) error {
	t := &archiver{fs: f, ctx: ctx, w: w, left: l, names: map[uint32]string{}, dirs: map[uint32]bool{}}
	root, err := f.inode(rootInode)
	if err == nil && root.mode&kindMask != kindDir {
		err = malformed("its root is no directory")
	}
	if err == nil {
		err = t.add("", root)
	}
	if err == nil {
		err = w.Flush()
	}
	return err
}

type archiver struct {
	fs    *FS
	ctx   context.Context
	w     *tar.Writer
	left  Limits
	names map[uint32]string      // of files with several: the first
	dirs  map[uint32]bool        // that were seen: each has one name
	leave func(name string) bool // of a layer; nil: it is none
}

func (t *archiver) add(name string, i *inode) error {
	if t.ctx.Err() != nil {
		return context.Cause(t.ctx)
	}
	if t.left.Entries--; t.left.Entries < 0 {
		return fmt.Errorf("%w: it has more files than allowed", ErrTooLarge)
	}
	if done, err := t.inLayer(name, i); done || err != nil {
		return err
	}
	h := &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(i.mode & 0o7777), Uid: i.uid, Gid: i.gid,
		ModTime: i.modified,
	}
	kind := i.mode & kindMask
	if kind == kindSocket {
		return nil
	}
	if first := t.names[i.number]; first != "" {
		h.Typeflag, h.Linkname = tar.TypeLink, first
		return t.w.WriteHeader(h)
	}
	if kind != kindDir && i.links > 1 {
		t.names[i.number] = name
	}
	if err := t.fs.attributes(i, h); err != nil {
		return err
	}
	hides, err := t.noted(h)
	if err != nil {
		return err
	}
	switch kind {
	case kindDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
		if name == "" {
			h.Name = "./"
		}
		if err := t.w.WriteHeader(h); err != nil {
			return err
		}
		if hides {
			if err := t.mark(path.Join(name, opaque), i.modified); err != nil {
				return err
			}
		}
		return t.children(name, i)
	case kindFile:
		return t.file(h, i)
	case kindLink:
		target, err := t.fs.target(i)
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case kindChar, kindBlock:
		h.Typeflag = tar.TypeChar
		if kind == kindBlock {
			h.Typeflag = tar.TypeBlock
		}
		if old := le.Uint32(i.place); old != 0 {
			h.Devmajor, h.Devminor = int64(old>>8&0xff), int64(old&0xff)
		} else {
			n := le.Uint32(i.place[4:])
			h.Devmajor, h.Devminor = int64(n>>8&0xfff), int64(n&0xff|n>>12&0xfff00)
		}
	case kindFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return malformed("%q has mode %#o", name, i.mode)
	}
	return t.w.WriteHeader(h)
}

func (t *archiver) file(h *tar.Header, i *inode) error {
	if t.left.Bytes -= i.size; t.left.Bytes < 0 {
		return fmt.Errorf("%w: its files have more bytes than allowed", ErrTooLarge)
	}
	h.Typeflag, h.Size = tar.TypeReg, i.size
	c, err := t.fs.content(i)
	if err != nil {
		return err
	}
	if err := t.w.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(t.w, stopping{t.ctx, c})
	return err
}

// stopping is a reader that ends with its context.
type stopping struct {
	ctx context.Context
	r   io.Reader
}

func (s stopping) Read(p []byte) (int, error) {
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	return s.r.Read(p)
}

// entry is a name in a directory.
type entry struct {
	name  string
	inode uint32
}

func (t *archiver) children(name string, dir *inode) error {
	if t.dirs[dir.number] {
		return malformed("directory %q has two names", name)
	}
	t.dirs[dir.number] = true
	all, err := t.fs.entries(dir, t.left.Entries+1)
	if err != nil {
		return fmt.Errorf("directory %q: %w", "/"+name, err)
	}
	slices.SortFunc(all, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	for n, e := range all {
		if n > 0 && all[n-1].name == e.name {
			return malformed("directory %q has two of %q", "/"+name, e.name)
		}
		i, err := t.fs.inode(e.inode)
		if err != nil {
			return err
		}
		child := path.Join(name, e.name)
		if len(child) > maxPath {
			return malformed("a path of %d bytes", len(child))
		}
		if child == "lost+found" && i.mode&kindMask == kindDir {
			if in, err := t.fs.entries(i, 1); err == nil && len(in) == 0 {
				continue
			}
		}
		if err := t.add(child, i); err != nil {
			return err
		}
	}
	return nil
}

// entries are a directory's, at most so many, without "." and "..".
func (f *FS) entries(dir *inode, most int64) (all []entry, err error) {
	if dir.size > maxDir {
		return nil, malformed("a directory of %d bytes", dir.size)
	}
	c, err := f.content(dir)
	if err != nil {
		return nil, err
	}
	b := make([]byte, f.block)
	for {
		if _, err := io.ReadFull(c, b); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("read directory: %w", err)
		}
		for rest := b; len(rest) > 0; {
			if len(rest) < 8 {
				return nil, malformed("an entry of a directory")
			}
			number, size, length := le.Uint32(rest), int(le.Uint16(rest[4:])), int(rest[6])
			if size == 0xffff || size == 0 && f.block == 1<<16 {
				size = 1 << 16
			}
			if size < 8 || size%4 != 0 || size > len(rest) || length > size-8 {
				return nil, malformed("an entry of a directory")
			}
			name := string(rest[8 : 8+length])
			if rest = rest[size:]; number == 0 || name == "." || name == ".." {
				continue
			}
			if name == "" || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
				return nil, malformed("a name %q", name)
			}
			if all = append(all, entry{name, number}); int64(len(all)) > most {
				return all, fmt.Errorf("%w: it has more files than allowed", ErrTooLarge)
			}
		}
	}
}

// target is where a symbolic link leads.
func (f *FS) target(i *inode) (string, error) {
	if i.size == 0 || i.size >= maxTarget {
		return "", malformed("a symbolic link to a name of %d bytes", i.size)
	}
	if i.size < int64(len(i.place)) && i.flags&hasExtents == 0 {
		return string(i.place[:i.size]), nil
	}
	c, err := f.content(i)
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(c)
	return string(text), err
}

// attributes adds the extended attributes that are not ACLs.
func (f *FS) attributes(i *inode, h *tar.Header) error {
	const magic = 0xea020000
	if b := i.attributes; len(b) > 4 && le.Uint32(b) == magic {
		if err := attributesIn(b[4:], b[4:], h); err != nil {
			return err
		}
	}
	if i.moreInBlock == 0 {
		return nil
	}
	b, err := f.blockAt(i.moreInBlock)
	if err != nil {
		return err
	}
	if le.Uint32(b) != magic {
		return malformed("extended attributes of inode %d", i.number)
	}
	return attributesIn(b[32:], b, h)
}

// attributesIn reads entries whose values are at offsets of values.
func attributesIn(entries, values []byte, h *tar.Header) error {
	spaces := map[byte]string{1: "user.", 4: "trusted.", 6: "security."}
	for b := entries; len(b) >= 4 && !bytes.Equal(b[:4], make([]byte, 4)); {
		if len(b) < 16 || len(b) < 16+int(b[0]) {
			return malformed("an extended attribute")
		}
		space, name := spaces[b[1]], string(b[16:16+int(b[0])])
		at, size := int(le.Uint16(b[2:])), int64(le.Uint32(b[8:]))
		if le.Uint32(b[4:]) != 0 || int64(at)+size > int64(len(values)) {
			return malformed("an extended attribute")
		}
		if space != "" {
			if name == "" || strings.ContainsAny(name, "=\x00") {
				return malformed("an extended attribute %q", name)
			}
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+space+name] = string(values[at : int64(at)+size])
		}
		b = b[min(len(b), (16+int(b[0])+3)&^3):]
	}
	return nil
}
