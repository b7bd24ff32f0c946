package imagename

import (
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// OfReference is a reference as people write it.
func OfReference(ref name.Reference) string {
	n := ref.Name()
	if rest, ok := strings.CutPrefix(n, name.DefaultRegistry+"/"); ok {
		n = strings.TrimPrefix(rest, "library/")
	}
	return n
}

// OfPath makes a repository's name of a path: "my-app" of "/tmp/My App.tar.gz".
func OfPath(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	base := strings.ToLower(filepath.Base(path))
	for _, suffix := range []string{".gz", ".tgz", ".zst", ".xz", ".tar"} {
		base = strings.TrimSuffix(base, suffix)
	}
	if base = plain(base); base == "" {
		return "image"
	}
	return base
}

// Given is what people call an image of a name that a file gives it, or one without, with base as
// repository then.
func Given(given, base string) string {
	if strings.ContainsAny(given, ":/") {
		if ref, err := name.ParseReference(given); err == nil {
			return OfReference(ref)
		}
	}
	tag := plain(given)
	if tag == "" {
		tag = "latest"
	}
	return base + ":" + tag
}

// OfText is OfReference of what may be anything.
func OfText(s string) string {
	ref, err := name.ParseReference(s)
	if err != nil {
		return s
	}
	return OfReference(ref)
}

// maxPlain is how long a part of a name may be: so much has every tool.
const maxPlain = 128

// plain makes of any text one that repositories and tags can be called: letters and digits with
// single ".", "_" and "-" between them.
func plain(s string) string {
	var b strings.Builder
	gap := ""
	for _, r := range s {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			if b.Len() > 0 {
				b.WriteString(gap)
			}
			gap = ""
			b.WriteRune(r)
		case gap == "" && (r == '.' || r == '_'):
			gap = string(r)
		case gap == "":
			gap = "-"
		}
	}
	text := b.String()
	return strings.TrimRight(text[:min(len(text), maxPlain)], "._-")
}
