package oci

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// registry is a repository, at its own host and at mirrors.
type registry struct {
	hosts []*host // in the order in which they are asked
	log   *slog.Logger
	idle  func()
}

// host is one that has a repository. It is logged in to when it is asked first.
type host struct {
	repo   name.Repository
	auth   authn.Authenticator
	client http.Client
}

// errRedirects ends what leads in circles.
var errRedirects = errors.New("too many redirects")

func inRegistry(ctx context.Context, text string, o Options) (found, error) {
	ref, err := name.ParseReference(text)
	if err != nil {
		return found{}, fileHint(err, text)
	}
	r := &registry{log: o.Log, idle: func() {}}
	base := cmp.Or(o.Transport, http.DefaultTransport)
	if t, ok := base.(*http.Transport); ok && o.Transport == nil {
		t = t.Clone()
		base, r.idle = t, t.CloseIdleConnections
	}
	for _, repo := range repositories(ref.Context(), o) {
		h := &host{repo: repo, auth: authn.Anonymous}
		if o.Keychain != nil {
			if h.auth, err = authn.Resolve(ctx, o.Keychain, repo); err != nil {
				return found{}, fmt.Errorf("log in to %s: %w", repo.RegistryStr(), err)
			}
		}
		h.client = http.Client{
			Transport: &manners{base: base, log: o.Log},
			CheckRedirect: func(_ *http.Request, via []*http.Request) error {
				if len(via) >= 10 {
					return errRedirects
				}
				return nil
			},
		}
		r.hosts = append(r.hosts, h)
	}
	f := found{from: r, name: familiar(ref)}
	if d, ok := ref.(name.Digest); ok {
		f.digest = d.DigestStr()
		if err := validDigest(f.digest); err != nil {
			return found{}, err
		}
	}
	if f.text, f.kind, err = r.login(ctx, ref.Identifier()); err != nil {
		return found{}, errors.Join(err, r.Close())
	}
	return f, nil
}

// repositories are where to look for one: mirrors are for Docker Hub alone, as docker has it. Elsewhere, the same path could
// be something else.
func repositories(repo name.Repository, o Options) (all []name.Repository) {
	if repo.RegistryStr() == name.DefaultRegistry {
		for _, m := range o.Mirrors {
			mirror, err := name.NewRegistry(m)
			if err != nil {
				o.Log.Warn("mirror skipped", "mirror", m, "err", err)
				continue
			}
			all = append(all, mirror.Repo(repo.RepositoryStr()))
		}
	}
	return append(all, repo)
}

// familiar is a reference as people write it.
func familiar(ref name.Reference) string {
	n := ref.Name()
	if rest, ok := strings.CutPrefix(n, name.DefaultRegistry+"/"); ok {
		n = strings.TrimPrefix(rest, "library/")
	}
	return n
}

// login finds the first host that has a manifest, which is then asked for everything else.
func (r *registry) login(ctx context.Context, identifier string) (text []byte, kind string, err error) {
	for {
		h := r.hosts[0]
		t, err := transport.NewWithContext(ctx, h.repo.Registry, h.auth, h.client.Transport, []string{h.repo.Scope(transport.PullScope)})
		if err == nil {
			h.client.Transport = t
			text, kind, err = h.manifest(ctx, identifier)
		}
		if err == nil || len(r.hosts) == 1 || ctx.Err() != nil {
			return text, kind, err
		}
		r.log.Warn("mirror does not serve", "mirror", h.repo.RegistryStr(), "image", h.repo.RepositoryStr(), "err", err)
		r.hosts = r.hosts[1:]
	}
}

const accept = typeIndex + ", " + typeManifest + ", " + typeDockerIndex + ", " + typeDockerManifest

func (r *registry) manifest(ctx context.Context, digest string) ([]byte, error) {
	text, _, err := r.hosts[0].manifest(ctx, digest)
	return text, err
}

// manifest also returns what the registry calls it, a media type.
func (h *host) manifest(ctx context.Context, identifier string) (text []byte, kind string, err error) {
	resp, err := h.get(ctx, "manifests/"+identifier, http.Header{"Accept": {accept}})
	if err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	text, err = readSmall(resp.Body)
	return text, resp.Header.Get("Content-Type"), err
}

func (r *registry) blob(ctx context.Context, digest string, offset int64) (io.ReadCloser, int64, error) {
	header := http.Header{}
	if offset > 0 {
		header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	resp, err := r.hosts[0].get(ctx, "blobs/"+digest, header)
	var status *transport.Error
	if offset > 0 && errors.As(err, &status) && status.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		offset = 0
		resp, err = r.hosts[0].get(ctx, "blobs/"+digest, nil)
	}
	if err != nil {
		return nil, 0, err
	}
	if !strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", offset)) {
		if resp.StatusCode == http.StatusPartialContent {
			return nil, 0, errors.Join(fmt.Errorf("%s: content range %q", resp.Request.URL.Redacted(), resp.Header.Get("Content-Range")), resp.Body.Close())
		}
		offset = 0
	}
	return resp.Body, offset, nil
}

// get asks for a part of the repository. The caller closes the response's body.
func (h *host) get(ctx context.Context, part string, header http.Header) (*http.Response, error) {
	// The transport knows whether it is to be plain HTTP.
	url := fmt.Sprintf("https://%s/v2/%s/%s", h.repo.RegistryStr(), h.repo.RepositoryStr(), part)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return nil, err
	}
	if err := transport.CheckError(resp, http.StatusOK, http.StatusPartialContent); err != nil {
		err = errors.Join(err, resp.Body.Close())
		if resp.StatusCode == http.StatusNotFound {
			err = fmt.Errorf("%w: %w", ErrNotFound, err)
		}
		return nil, err
	}
	return resp, nil
}

func (r *registry) Close() error {
	r.idle()
	return nil
}

// here says whether a host is this machine.
func here(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
