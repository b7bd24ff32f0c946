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

	"push.rocks/smartvm/image/trust"
	"push.rocks/smartvm/internal/hint"
)

// dockerTransport begins a registry's reference as skopeo writes it.
const dockerTransport = "docker://"

// Local says whether a reference is of this machine's files, or has their form: no registry is
// asked for it.
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
	return ref == "." || ref == ".." || strings.HasPrefix(ref, "/") || strings.HasPrefix(ref, "./") ||
		strings.HasPrefix(ref, "../")
}

// find goes where a reference leads.
func find(ctx context.Context, ref string, o Options, policy *trust.Policy) (found, error) {
	if !Local(ref) {
		return inRegistry(ctx, strings.TrimPrefix(ref, dockerTransport), o, policy)
	}
	f, err := inFiles(ctx, ref, o)
	if err != nil {
		return found{}, err
	}
	transport, path := "docker-archive", ""
	if scheme, rest, ok := strings.Cut(ref, ":"); ok {
		transport = scheme
		path, _ = cutRef(rest)
	}
	if f.subject, err = trust.OfFile(transport, path); err != nil {
		return found{}, errors.Join(err, f.from.Close())
	}
	return f, nil
}

func inFiles(ctx context.Context, ref string, o Options) (found, error) {
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
		return found{},
			hint.Add(errors.New("images of a docker daemon come by way of docker save"),
				"docker save %.300s | smartvm image pull -", rest)
	case "containers-storage":
		return found{},
			hint.Add(errors.New("images of podman's come by way of podman save"),
				"podman save %.300s | smartvm image pull -", rest)
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
		return hint.Add(err,
			"docker-archive:%s is what docker save wrote; smartvm image import --rootfs %s NAME takes a root file system", path,
			path)
	}
	for _, kind := range [][2]string{{layoutIndex, "oci"}, {dockerManifest, "dir"}} {
		if _, serr := os.Stat(filepath.Join(path, kind[0])); serr == nil {
			return hint.Add(err, "say %s:%s", kind[1], path)
		}
	}
	return hint.Add(err, "smartvm image import --rootfs %s NAME takes a root file system; a layout would have an %s",
		path, layoutIndex)
}

// fileHint adds to an error that there is a file of that name.
func fileHint(err error, ref string) error {
	if _, serr := os.Lstat(ref); serr == nil {
		return hint.Add(err,
			"there is a file %.300s here: docker-archive:%.300s reads what docker save wrote, oci:%.300s a layout",
			ref, ref, ref)
	}
	return err
}

// explain makes an error of a registry one that people can do something about.
func explain(err error, repo name.Repository, ref string) error {
	var status *transport.Error
	switch {
	case errors.Is(err, ErrPlainHTTP):
		return hint.Add(err, "insecure = true in a [[registry]] of registries.conf allows it, and so does --tls-verify=false")
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return hint.Add(err,
			"its authority's certificate belongs into /etc/containers/certs.d/%s/ca.crt, or a directory for --cert-dir",
			repo.RegistryStr())
	case errors.Is(err, errRedirects):
		return err
	case errors.As(err, &status):
		switch status.StatusCode {
		case http.StatusUnauthorized, http.StatusForbidden:
			err = hint.Add(err, "there is no such image, or it wants a login: docker login %s, or --creds USER",
				repo.RegistryStr())
		}
		return fileHint(err, ref)
	case errors.As(err, new(*url.Error)):
		err = &UnreachableError{Host: repo.RegistryStr(), Err: err}
		err = hint.Add(err,
			"smartvm image ls shows what is here; images come without a registry by docker-archive:FILE, oci:DIR and smartvm image import")
		return fileHint(err, ref)
	}
	return err
}
