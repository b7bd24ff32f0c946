package flatten

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/ext4/mkfs"
)

// Whiteouts: https://github.com/opencontainers/image-spec/blob/main/layer.md#whiteouts
const (
	whiteout = ".wh."
	reserved = ".wh..wh." // whatever AUFS wanted to remember
	opaque   = ".wh..wh..opq"
	// aufsLinks is where AUFS has the content of files with several names, which are hard links to it:
	// https://github.com/moby/moby/blob/v27.0.0/pkg/archive/diff.go
	aufsLinks = ".wh..wh.plnk"
)

// Types of GNU tar's that Go does not name:
// https://www.gnu.org/software/tar/manual/html_node/Standard.html
const (
	gnuVolume  = 'V' // the archive's name
	gnuDumpDir = 'D' // a directory, its content a list of names
	gnuRest    = 'M' // what another volume has the beginning of
)

// kind is what an entry asks for.
type kind uint8

const (
	kindSkip kind = iota
	kindDir
	kindOther // anything else that has a name
	kindLink  // another name for such
	kindWhiteout
	kindOpaque
)

// entry is what a tar's header comes to.
type entry struct {
	kind   kind
	name   string     // clean, relative; "" is the root. Of a whiteout what it removes, of an opaque mark the directory.
	target string     // of a link, clean and relative
	inode  mkfs.Inode // of kindDir and kindOther, without content and extended attributes
	xattrs map[string]string
	aufs   bool // a file of AUFS's own, which hard links of its layer may lead to
}

// limits count what an image holds.
type limits struct {
	bytes, entries       int64
	maxBytes, maxEntries int64
}

func newLimits(l Limits) limits {
	l = l.OrDefaults()
	return limits{maxBytes: l.MaxBytes, maxEntries: l.MaxEntries}
}

func (l *limits) add(size int64) error {
	if l.entries++; l.entries > l.maxEntries {
		return &LimitError{"entries", l.maxEntries, "MaxEntries"}
	}
	if l.bytes += size; l.bytes > l.maxBytes || size > l.maxBytes {
		return bytesLimit("bytes of files", l.maxBytes)
	}
	return nil
}

// readTar calls f for each entry. Whiteouts are told from files only in layers. What is no layer
// has no digest, so it must have entries, and the mark of its end.
func readTar(r io.Reader, layer bool, l *limits, f func(e entry, content io.Reader) error) error {
	end := &tail{r: r}
	if !layer {
		r = end
	}
	before := l.entries
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) && !layer {
			err = end.check(l.entries - before)
			if err == nil {
				return nil
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		if err := l.add(max(h.Size, 0)); err != nil {
			return err
		}
		e, err := clean(h, layer)
		if err == nil && e.kind != kindSkip {
			err = f(e, t)
		}
		if err != nil {
			return err
		}
	}
}

// tail knows what a tar ends with. Headers, and the end's mark of two, are read in blocks of 512
// bytes.
type tail struct {
	r    io.Reader
	zero int  // bytes of zeros in small reads, up to now
	eof  bool // the stream's end came before the mark's
}

func (t *tail) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	switch {
	case n == 0:
	case n <= tarBlock && bytes.Equal(p[:n], zeros[:n]):
		t.zero += n
	default:
		t.zero = 0
	}
	t.eof = t.eof || errors.Is(err, io.EOF) && n == 0
	return n, err
}

const tarBlock = 512

var zeros [tarBlock]byte

// check says what is wrong with a tar that has come to its end after so many entries. One block for
// the mark is taken, as GNU tar does with a warning.
func (t *tail) check(entries int64) error {
	switch {
	case entries == 0:
		return ErrEmpty
	case t.eof && t.zero < tarBlock:
		return ErrCut
	}
	return nil
}

func clean(h *tar.Header, layer bool) (e entry, err error) {
	if e.name, err = cleanName(h.Name); err != nil {
		return entry{}, entryError(h, err.Error())
	}
	if layer {
		if done, err := e.whiteout(h.Typeflag); done || err != nil {
			return e, err
		}
	}
	i := &e.inode
	i.Mode, i.UID, i.GID, i.ModTime = uint16(h.Mode&0o7777), uint32(h.Uid), uint32(h.Gid), clampTime(h.ModTime)
	switch h.Typeflag {
	case tar.TypeXGlobalHeader, gnuVolume:
		return entry{}, nil
	case tar.TypeDir, gnuDumpDir:
		e.kind, i.Mode = kindDir, i.Mode|unix.S_IFDIR
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		e.kind, i.Mode = kindOther, i.Mode|unix.S_IFREG
	case tar.TypeSymlink:
		if h.Linkname == "" || len(h.Linkname) > maxPath {
			return entry{}, entryError(h, fmt.Sprintf("a symbolic link to a name of %d bytes", len(h.Linkname)))
		}
		e.kind, i.Mode, i.Target = kindOther, i.Mode|unix.S_IFLNK|0o777, h.Linkname
	case tar.TypeChar, tar.TypeBlock:
		if h.Devmajor < 0 || h.Devmajor > 0xfff || h.Devminor < 0 || h.Devminor > 0xfffff {
			return entry{}, entryError(h, fmt.Sprintf("device %d:%d, which Linux cannot have", h.Devmajor, h.Devminor))
		}
		kind := uint16(unix.S_IFCHR)
		if h.Typeflag == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		e.kind, i.Mode, i.Major, i.Minor = kindOther, i.Mode|kind, uint32(h.Devmajor), uint32(h.Devminor)
	case tar.TypeFifo:
		e.kind, i.Mode = kindOther, i.Mode|unix.S_IFIFO
	case tar.TypeLink:
		if e.target, err = cleanName(h.Linkname); err != nil {
			return entry{}, entryError(h, "hard link: "+err.Error())
		}
		e.kind = kindLink
	default:
		if layer || h.Typeflag == gnuRest {
			return entry{}, entryError(h, fmt.Sprintf("type %q is unknown", h.Typeflag))
		}
		e.kind, i.Mode = kindOther, i.Mode|unix.S_IFREG // as GNU tar does
	}
	if e.aufs && i.Mode&unix.S_IFMT != unix.S_IFREG {
		return entry{}, nil
	}
	if e.kind != kindDir && e.name == "" {
		return entry{}, entryError(h, "must be a directory")
	}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= 1<<32-1 || int64(h.Gid) >= 1<<32-1 {
		return entry{}, entryError(h, fmt.Sprintf("owner %d:%d", h.Uid, h.Gid))
	}
	if e.xattrs, err = xattrs(h); err != nil {
		return entry{}, err
	}
	return e, nil
}

// whiteout makes e what its name says, if it is reserved.
func (e *entry) whiteout(typeflag byte) (done bool, err error) {
	if !strings.Contains("/"+e.name, "/"+whiteout) {
		return false, nil
	}
	dir, base := path.Split(e.name)
	dir = strings.TrimSuffix(dir, "/")
	switch {
	case base == opaque:
		e.kind, e.name = kindOpaque, dir
	case dir == aufsLinks && typeflag != tar.TypeDir:
		e.aufs = true
		return false, nil
	case strings.HasPrefix(base, reserved) || strings.Contains("/"+dir, "/"+reserved):
		e.kind = kindSkip
	case strings.Contains("/"+dir, "/"+whiteout):
		return false, &EntryError{Name: short(e.name), Reason: "below a whiteout"}
	default:
		removed := strings.TrimPrefix(base, whiteout)
		if removed == "" || removed == "." || removed == ".." {
			return false, &EntryError{Name: short(e.name), Reason: "a whiteout of nothing"}
		}
		e.kind, e.name = kindWhiteout, path.Join(dir, removed)
	}
	return true, nil
}

// cleanName makes a name relative to the root.
func cleanName(name string) (string, error) {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", errors.New(`has ".." in its name`)
		}
		if len(part) > maxName {
			return "", fmt.Errorf("has a part of %d bytes in its name", len(part))
		}
	}
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if len(name) > maxPath {
		return "", fmt.Errorf("has a name of %d bytes", len(name))
	}
	return name, nil
}

// clampTime knows no times before 1970.
func clampTime(t time.Time) time.Time {
	if t.Unix() < 0 {
		return time.Unix(0, 0)
	}
	return t
}

const xattrRecord = "SCHILY.xattr."

// maxXattr is how many bytes of a file's extended attributes ext4 has room for, without their own
// blocks.
const maxXattr = 4096 - 64

// xattrs picks the extended attributes that a guest is to see, by their full names.
func xattrs(h *tar.Header) (map[string]string, error) {
	var kept map[string]string
	used := 0
	for key, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if !ok {
			if name, value, ok = libarchive(key, value); !ok {
				continue
			}
			if _, twice := h.PAXRecords[xattrRecord+name]; twice {
				continue
			}
		}
		space, rest, _ := strings.Cut(name, ".")
		if (space != "user" && space != "trusted" && space != "security") || strings.HasPrefix(rest, "overlay.") {
			continue
		}
		if rest == "" || len(rest) > maxName {
			return nil, entryError(h, fmt.Sprintf("an extended attribute's name of %d bytes", len(name)))
		}
		used += 16 + len(rest) + len(value) + 6
		if kept == nil {
			kept = map[string]string{}
		}
		kept[name] = value
	}
	if used > maxXattr {
		return nil, entryError(h, fmt.Sprintf(
			"%d bytes of extended attributes, where ext4 can hold %d: remove some (getfattr -d -m -, setfattr -x), or leave the file out", used, maxXattr))
	}
	return kept, nil
}

// libarchive reads an extended attribute as bsdtar may write it:
// https://github.com/libarchive/libarchive/wiki/ManPageTar5
func libarchive(key, value string) (name, plain string, ok bool) {
	if name, ok = strings.CutPrefix(key, "LIBARCHIVE.xattr."); !ok {
		return "", "", false
	}
	name, err := url.PathUnescape(name)
	if err != nil {
		return "", "", false
	}
	text, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(value, "="))
	return name, string(text), err == nil
}

func entryError(h *tar.Header, reason string) error {
	return &EntryError{Name: short(h.Name), Reason: reason}
}

// short cuts a name to what fits an error's text.
func short(name string) string {
	if len(name) > 200 {
		return name[:200] + "…"
	}
	return name
}
