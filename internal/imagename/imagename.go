// Package imagename knows how images are called: what names may be, and which spellings are of one.
package imagename

import (
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"
)

// maxName is the most bytes of a new name: base64 of it and some more are a file's name.
const maxName = 150

// namePattern is what people may call an image: it looks like a reference without being a path or
// one of the schemes.
var namePattern = regexp.MustCompile(`^[a-z0-9][A-Za-z0-9._/:@-]*$`)

// Valid says whether an image can be given a name.
func Valid(name string) error {
	if !namePattern.MatchString(name) || len(name) > maxName || strings.Contains(name, "..") ||
		strings.Contains(name, "//") {
		return Invalid(
			"image name %.300q: want at most %d letters, digits and ._-/:@, beginning with a small letter or digit",
			name, maxName)
	}
	return nil
}

// Own is for names that people give: those with a digest are for what has it.
func Own(name string) error {
	err := Valid(name)
	if _, _, pinned := CutDigest(name); pinned {
		err = errors.Join(err, Invalid("image name %.300q: a digest cannot be chosen", name))
	}
	return err
}

// Familiar is a name as a pull has it: Docker Hub's host is left out, and what it has for official
// images.
func Familiar(name string) string {
	for _, host := range []string{"docker.io/", "index.docker.io/"} {
		name = strings.TrimPrefix(name, host)
	}
	return strings.TrimPrefix(name, "library/")
}

// CutDigest cuts NAME[:TAG]@sha256:DIGITS into the name and the digest.
func CutDigest(ref string) (repository, digest string, pinned bool) {
	name, digest, pinned := strings.Cut(ref, "@")
	if !pinned || !strings.HasPrefix(digest, "sha256:") {
		return ref, "", false
	}
	return untagged(name), digest, true
}

func untagged(name string) string {
	if colon := strings.LastIndexByte(name, ':'); colon > strings.LastIndexByte(name, '/') {
		return name[:colon]
	}
	return name
}

// Pinned is a reference of a registry with a digest in place of a tag.
func Pinned(ref, digest string) string {
	name, _, _ := strings.Cut(ref, "@")
	return untagged(name) + "@" + digest
}

// Of says whether a name is one of a repository.
func Of(name, repository string) bool {
	rest, ok := strings.CutPrefix(name, Familiar(repository))
	return ok && (rest == "" || rest[0] == ':' || rest[0] == '@')
}

// invalidError is what a caller got wrong. It is fs.ErrInvalid.
type invalidError struct{ error }

func (e invalidError) Is(target error) bool { return target == fs.ErrInvalid }

// Invalid makes an error that is fs.ErrInvalid.
func Invalid(format string, args ...any) error { return invalidError{fmt.Errorf(format, args...)} }
