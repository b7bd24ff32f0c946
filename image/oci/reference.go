package oci

import (
	"context"
	"crypto/x509"
	"errors"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"push.rocks/smartvm/internal/hint"
)

// dockerTransport begins a registry's reference as skopeo writes it.
const dockerTransport = "docker://"

// Local says whether a reference is of this machine's files, or has their form: no registry is asked for it.
func Local(ref string) bool {
	scheme, rest, ok := strings.Cut(ref, ":")
	if ok && !strings.HasPrefix(rest, "//") {
		switch scheme {
		case "oci", "oci-archive", "docker-archive", "dir", "docker-daemon", "containers-storage":
			return true
		}
	}
	return ref == "-" || isPath(ref)
}

// isPath says whether a reference can only be a path.
func isPath(ref string) bool {
	return ref == "." || ref == ".." || strings.HasPrefix(ref, "/") || strings.HasPrefix(ref, "./") || strings.HasPrefix(ref, "../")
}

// find goes where a reference leads.
func find(ctx context.Context, ref string, o Options) (found, error) {
	if !Local(ref) {
		return inRegistry(ctx, strings.TrimPrefix(ref, dockerTransport), o)
	}
	scheme, rest, _ := strings.Cut(ref, ":")
	switch {
	case ref == "-" && o.Stdin != nil:
		return inSpool(ctx, o.Stdin, place{base: "image"}, o)
	case ref == "-":
		return found{}, errors.New("there is no standard input")
	case isPath(ref):
		return found{}, pathError(ref)
	}
	switch scheme {
	case "oci":
		return inLayout(rest)
	case "dir":
		return inDir(rest)
	case "docker-daemon":
		return found{}, hint.Add(errors.New("images of a docker daemon come by way of docker save"), "docker save %.300s | smartvm image pull -", rest)
	case "containers-storage":
		return found{}, hint.Add(errors.New("images of podman's come by way of podman save"), "podman save %.300s | smartvm image pull -", rest)
	}
	return inArchive(ctx, rest, o)
}

// pathError says that a path is no reference, and which one is meant.
func pathError(path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return notExist(err)
	}
	err = errors.New("it is a path")
	if !fi.IsDir() {
		return hint.Add(err, "docker-archive:%s is what docker save wrote; smartvm image import --rootfs %s NAME takes a root file system", path, path)
	}
	for _, kind := range [][2]string{{layoutIndex, "oci"}, {dockerManifest, "dir"}} {
		if _, serr := os.Stat(filepath.Join(path, kind[0])); serr == nil {
			return hint.Add(err, "say %s:%s", kind[1], path)
		}
	}
	return hint.Add(err, "smartvm image import --rootfs %s NAME takes a root file system; a layout would have an %s", path, layoutIndex)
}

// fileHint adds to an error that there is a file of that name.
func fileHint(err error, ref string) error {
	if _, serr := os.Lstat(ref); serr == nil {
		return hint.Add(err, "there is a file %.300s here: docker-archive:%.300s reads what docker save wrote, oci:%.300s a layout", ref, ref, ref)
	}
	return err
}

// baseName makes a repository's name of a path: "my-app" of "/tmp/My App.tar.gz".
func baseName(path string) string {
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

// called is what people call an image of a name that a file gives it: familiar of it, or of a name with base as repository.
func called(given, base string) string {
	if strings.ContainsAny(given, ":/") {
		if ref, err := name.ParseReference(given); err == nil {
			return familiar(ref)
		}
	}
	tag := plain(given)
	if tag == "" {
		tag = "latest"
	}
	return base + ":" + tag
}

// familiarName is familiar of a name that may be anything.
func familiarName(s string) string {
	ref, err := name.ParseReference(s)
	if err != nil {
		return s
	}
	return familiar(ref)
}

// maxPlain is how long a part of a name may be: so much has every tool.
const maxPlain = 128

// plain makes of any text one that repositories and tags can be called: letters and digits with single ".", "_" and "-"
// between them.
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

// explain makes an error of a registry one that people can do something about.
func explain(err error, repo name.Repository, ref string) error {
	var status *transport.Error
	switch {
	case errors.Is(err, ErrPlainHTTP):
		return hint.Add(err, "insecure = true in a [[registry]] of registries.conf allows it")
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return hint.Add(err, "its authority's certificate belongs into /etc/containers/certs.d/%s/ca.crt", repo.RegistryStr())
	case errors.Is(err, errRedirects):
		return err
	case errors.As(err, &status):
		switch status.StatusCode {
		case http.StatusUnauthorized, http.StatusForbidden:
			err = hint.Add(err, "there is no such image, or it wants a login: docker login %s", repo.RegistryStr())
		}
		return fileHint(err, ref)
	case errors.As(err, new(*url.Error)):
		err = &UnreachableError{Host: repo.RegistryStr(), Err: err}
		err = hint.Add(err, "smartvm image ls shows what is here; images come without a registry by docker-archive:FILE, oci:DIR and smartvm image import")
		return fileHint(err, ref)
	}
	return err
}
