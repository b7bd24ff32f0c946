// Package flatten makes read-only ext4 images: of a container image's layers, of a tar and of a directory tree. No file
// system is mounted, nobody has to be root, and nothing but the image's file is written.
//
// Tars are foreign. What they may hold, and what becomes of it:
//
//   - names are taken relative to the root, absolute ones too; ".." is refused;
//   - an entry below a name that is no directory makes it one: there is no way through a symbolic link;
//   - a hard link leads to a file of its own layer or of one below, or is refused;
//   - devices are kept, being mere numbers until a guest opens them;
//   - extended attributes user, trusted and security are kept, but for those that overlayfs obeys; ACLs are not;
//   - times before 1970 become 1970, and only the time of modification is kept;
//   - directories that no entry describes are root's, with mode 0755.
//
// Limits are MaxBytes and MaxEntries, and those of Linux for names.
package flatten

import "fmt"

const (
	// MaxBytes is how much an image may hold: unpacked, and as its files' sizes add up, holes included.
	MaxBytes = 32 << 30
	// MaxEntries is how many entries the tars of an image may have together.
	MaxEntries = 1 << 19

	maxPath = 4095 // bytes
	maxName = 255  // bytes
)

// LimitError refuses what is larger than this package takes.
type LimitError struct {
	What  string
	Limit int64
}

func (e *LimitError) Error() string { return fmt.Sprintf("more than %d %s", e.Limit, e.What) }

// EntryError refuses an entry of a tar.
type EntryError struct {
	Name   string // as the tar has it, cut when long
	Reason string
}

func (e *EntryError) Error() string { return fmt.Sprintf("tar entry %q: %s", e.Name, e.Reason) }

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
