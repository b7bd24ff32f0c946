// Package flatten makes read-only ext4 images: of a container image's layers, of a tar and of a
// directory tree. No file system is mounted, nobody has to be root, and nothing but the image's
// file is written.
//
// Tars are foreign. What they may hold, and what becomes of it:
//
//   - names are taken relative to the root, absolute ones too; ".." is refused;
//   - an entry below a symbolic link, of its own layer or of a lower one, goes where the link leads
//     within the root, through at most 40 links; so do the targets of hard links and what whiteouts
//     name. Only the last part of a name is not followed: a directory, file or link takes the place
//     of a link that has its name;
//   - an entry below any other name that is no directory makes it one;
//   - a whiteout removes what lower layers have, wherever in its layer it stands;
//   - a hard link leads to a file of its own layer or of one below, or is refused. What AUFS kept
//     for hard links alone is such a file, and has no name;
//   - devices are kept, being mere numbers until a guest opens them;
//   - extended attributes user, trusted and security are kept, except trusted.overlay.* and
//     user.overlay.*, which overlayfs would interpret; ACLs are not;
//   - times before 1970 become 1970, and only the time of modification is kept;
//   - directories that no entry describes are root's, with mode 0755.
//
// The rules for layers are those of
// https://github.com/opencontainers/image-spec/blob/main/layer.md; docs/architecture.md says where
// other programs differ. What an image may hold is bounded by Limits, names by what Linux takes, a
// file's hard links and extended attributes by what ext4 takes.
package flatten

import (
	"cmp"
	"errors"
	"fmt"
)

const (
	// MaxBytes is the default of Limits.MaxBytes.
	MaxBytes = 32 << 30
	// MaxEntries is the default of Limits.MaxEntries.
	MaxEntries = 1 << 19

	maxPath = 4095 // bytes
	maxName = 255  // bytes
	maxHops = 40   // symbolic links on the way to a name, as in Linux
	// maxSteps are the parts of names that symbolic links add, of all entries of an image: each is
	// looked up.
	maxSteps = 1 << 26
)

// ErrEmpty says that a tar or a directory holds nothing at all.
var ErrEmpty = errors.New("it is empty")

// ErrCut says that a tar has not the zeros at its end that say that it is complete.
var ErrCut = errors.New("it is cut off: the mark of its end is missing")

// Limits bound what an image may hold. Zero values stand for defaults.
type Limits struct {
	// MaxBytes is how much an image may hold: unpacked, and as its files' sizes add up, holes
	// included. At most 8 TiB.
	MaxBytes int64 `json:"maxBytes,omitempty"`
	// MaxEntries is how many entries the tars of an image may have together, those that others
	// override included, and how many directories names may imply. Each takes about 1 KiB of memory.
	// At most 2^31.
	MaxEntries int64 `json:"maxEntries,omitempty"`
}

// OrDefaults fills in what is zero.
func (l Limits) OrDefaults() Limits {
	return Limits{min(cmp.Or(l.MaxBytes, MaxBytes), 8<<40), min(cmp.Or(l.MaxEntries, MaxEntries), 1<<31)}
}

// LimitError refuses what is larger than this package takes.
type LimitError struct {
	What   string
	Limit  int64
	Option string // the field of Limits that raises it, if there is one
}

func (e *LimitError) Error() string {
	text := fmt.Sprintf("more than %d %s", e.Limit, e.What)
	if e.Option != "" {
		text += ", which is the limit " + e.Option
	}
	return text
}

// Hint is how to raise the limit.
func (e *LimitError) Hint() string {
	flag := map[string]string{"MaxBytes": "--max-image-size", "MaxEntries": "--max-image-entries"}[e.Option]
	if flag == "" {
		return ""
	}
	return fmt.Sprintf("raise it: %s, or Limits.%s in the image options of the library", flag, e.Option)
}

func bytesLimit(what string, limit int64) error { return &LimitError{what, limit, "MaxBytes"} }

// EntryError refuses an entry of a tar, or a file of a directory.
type EntryError struct {
	Name   string // as the tar has it, or the file's path; cut when long
	Reason string
	IsFile bool // it is a file of a directory
}

func (e *EntryError) Error() string {
	what := "tar entry"
	if e.IsFile {
		what = "file"
	}
	return fmt.Sprintf("%s %q: %s", what, e.Name, e.Reason)
}

// DigestError says that content is not what its digest says.
type DigestError struct {
	What      string // "manifest", "configuration", "layer" or "unpacked layer"
	Want, Got string // "sha256:…"; Got is empty when the size was wrong already
}

func (e *DigestError) Error() string {
	if e.Got == "" {
		return fmt.Sprintf("%s %s: wrong size", e.What, e.Want)
	}
	return fmt.Sprintf("%s %s: has digest %s", e.What, e.Want, e.Got)
}
