package firecracker

import (
	"bytes"
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// MinVersion is the oldest Firecracker this package speaks to. Callers refuse older ones.
var MinVersion = Version{Major: 1, Minor: 7, Patch: 0}

// OldestSupported is the oldest release whose series upstream still mends. This package speaks to
// older ones too.
var OldestSupported = Version{Major: 1, Minor: 16, Patch: 0}

// maxVersionLen bounds what is looked at, and quoted in errors, as a version.
const maxVersionLen = 64

// Version is a released Firecracker version. The zero Version means "unknown".
type Version struct {
	Major, Minor, Patch int
}

// ParseVersion reads "1.12.1" or "v1.12.1". A suffix, as in "1.17.0-dev", is dropped: a development
// build counts as the release it leads to.
func ParseVersion(s string) (Version, error) {
	text := strings.TrimPrefix(s, "v")
	if len(s) > maxVersionLen {
		return Version{}, fmt.Errorf("parse version: %d bytes, want at most %d", len(s), maxVersionLen)
	}
	if i := strings.IndexAny(text, "-+"); i >= 0 {
		text = text[:i]
	}
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		return Version{}, fmt.Errorf("parse version %q: want MAJOR.MINOR.PATCH", s)
	}
	var numbers [3]int
	for i, part := range parts {
		// 16 bits are plenty, and ParseUint takes neither signs nor underscores here.
		n, err := strconv.ParseUint(part, 10, 16)
		if err != nil {
			return Version{}, fmt.Errorf("parse version %q: want MAJOR.MINOR.PATCH", s)
		}
		numbers[i] = int(n)
	}
	return Version{Major: numbers[0], Minor: numbers[1], Patch: numbers[2]}, nil
}

// ParseVersionOutput reads the version out of what `firecracker --version` or `jailer --version`
// printed. Program is the name the first line must begin with, "Firecracker" or "Jailer". Later
// lines are skipped, because the VMM logs there.
func ParseVersionOutput(program string, output []byte) (Version, error) {
	line, _, _ := bytes.Cut(output, []byte("\n"))
	text := string(bytes.TrimSpace(line[:min(len(line), 2*maxVersionLen)]))
	version, ok := strings.CutPrefix(text, program+" ")
	if !ok {
		return Version{}, fmt.Errorf("parse version output %q: want %q", text, program+" vMAJOR.MINOR.PATCH")
	}
	return ParseVersion(version)
}

// Compare returns -1 if v is older than w, 0 if they are equal and 1 if v is newer.
func (v Version) Compare(w Version) int {
	return cmp.Or(cmp.Compare(v.Major, w.Major), cmp.Compare(v.Minor, w.Minor), cmp.Compare(v.Patch, w.Patch))
}

// AtLeast reports whether v is w or newer.
func (v Version) AtLeast(w Version) bool { return v.Compare(w) >= 0 }

// IsZero reports whether the version is unknown.
func (v Version) IsZero() bool { return v == Version{} }

// String returns the version as the VMM's GET /version does: "1.12.1", without a "v".
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }
