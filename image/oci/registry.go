package oci

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/image/registries"
	"push.rocks/smartvm/image/trust"
	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/imagename"
)

// registry is a repository, at its own host and at mirrors.
type registry struct {
	log  *slog.Logger
	idle []func()

	mu    sync.Mutex
	hosts []*host          // the first is asked; one that does not serve is left for the next. The last stays
	gave  map[string]*host // what gave a blob last, by digest
}

// host is one that has a repository. It is logged in to when it is asked first.
type host struct {
	repo     name.Repository
	keychain authn.Keychain
	auth     authn.Authenticator // in place of the keychain's, if not nil

	mu     sync.Mutex // while it is logged in to
	in     bool
	client http.Client
}

// errRedirects ends what leads in circles.
var errRedirects = errors.New("too many redirects")

// parse reads a reference as it was typed, and as it is meant.
func parse(text string, o Options) (typed, ref name.Reference, conf *registries.Config, err error) {
	if typed, err = name.ParseReference(text); err != nil {
		return nil, nil, nil,
			fileHint(hint.Add(err, "a registry's image is [HOST/]NAME[:TAG], its name in small letters"), text)
	}
	conf = &registries.Config{}
	if o.Registries != nil {
		if conf, err = o.Registries(); err != nil {
			return nil, nil, nil, err
		}
	}
	ref, err = name.ParseReference(conf.Expand(text))
	return typed, ref, conf, err
}

// transport is how a place is spoken to.
func (o Options) transport(conf *registries.Config, p registries.Place) (m *manners, idle func(), err error) {
	base, idle := cmp.Or(o.Transport, http.DefaultTransport), func() {}
	if t, ok := base.(*http.Transport); ok {
		if t, err = conf.Transport(t, p); err != nil {
			return nil, nil, err
		}
		base, idle = t, t.CloseIdleConnections
	}
	m = &manners{
		Transport: download.Transport{Base: base, Log: o.Log}, local: here(hostOf(p.Repository)),
		insecure: p.Insecure,
	}
	return m, idle, nil
}

func inRegistry(ctx context.Context, text string, o Options, policy *trust.Policy) (found, error) {
	typed, ref, conf, err := parse(text, o)
	if err != nil {
		return found{}, err
	}
	places, err := places(ref, conf, o)
	if err != nil {
		return found{}, err
	}
	r := &registry{log: o.Log, gave: map[string]*host{}}
	for _, p := range places {
		t, idle, err := o.transport(conf, p)
		if err != nil {
			return found{}, errors.Join(err, r.Close())
		}
		r.idle = append(r.idle, idle)
		h := &host{repo: p.Repository, keychain: o.Keychain}
		h.client = http.Client{
			Transport: t,
			CheckRedirect: func(_ *http.Request, via []*http.Request) error {
				if len(via) >= 10 {
					return errRedirects
				}
				return nil
			},
		}
		r.hosts = append(r.hosts, h)
	}
	r.hosts[len(r.hosts)-1].auth = o.Login
	f := found{from: r, name: imagename.OfReference(typed), subject: trust.OfRegistry(ref)}
	f.subject.Signatures = r.signatures
	if d, ok := ref.(name.Digest); ok {
		f.digest = d.DigestStr()
		if err := manifest.ValidDigest(f.digest); err != nil {
			return found{}, err
		}
	}
	err = r.ask(ctx, func(h *host) (err error) {
		// What has not changed may not be allowed any more.
		if f.digest == "" && o.Unless != "" && policy.Anything(f.subject) && h.digest(ctx, ref.Identifier()) == o.Unless {
			return ErrUnchanged
		}
		f.text, f.kind, err = h.manifest(ctx, ref.Identifier())
		return err
	})
	if err != nil && ctx.Err() == nil {
		err = explain(err, ref.Context(), text)
	}
	if err != nil {
		return found{}, errors.Join(err, r.Close())
	}
	return f, nil
}

// places are where to look for an image: Options.Mirrors are for Docker Hub alone, as docker has
// it. Elsewhere, the same path could be something else.
func places(ref name.Reference, conf *registries.Config, o Options) (all []registries.Place, err error) {
	if repo := ref.Context(); repo.RegistryStr() == name.DefaultRegistry {
		var options []name.Option
		insecure := conf.TLSVerify != nil && !*conf.TLSVerify
		if insecure {
			options = append(options, name.Insecure)
		}
		for _, m := range o.Mirrors {
			mirror, err := name.NewRegistry(m, options...)
			if err != nil {
				o.Log.Warn("mirror skipped", "mirror", m, "err", err)
				continue
			}
			all = append(all, registries.Place{Repository: mirror.Repo(repo.RepositoryStr()), Insecure: insecure})
		}
	}
	own, err := conf.Places(ref)
	return append(all, own...), err
}

// ask calls f with hosts in turn until one serves, which is then asked for everything else.
func (r *registry) ask(ctx context.Context, f func(h *host) error) error {
	for {
		r.mu.Lock()
		h, last := r.hosts[0], len(r.hosts) == 1
		r.mu.Unlock()
		err := h.login(ctx)
		if err == nil {
			err = f(h)
		}
		if err == nil || errors.Is(err, ErrUnchanged) || last || ctx.Err() != nil {
			return err
		}
		r.leave(h, err)
	}
}

// leave has the next host asked in place of one that does not serve.
func (r *registry) leave(h *host, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.hosts) > 1 && r.hosts[0] == h {
		r.log.Warn("mirror does not serve", "mirror", h.repo.RegistryStr(), "image", h.repo.RepositoryStr(), "err", err)
		r.hosts = r.hosts[1:]
	}
}

func (r *registry) elsewhere(digest string, err error) bool {
	r.mu.Lock()
	h := r.gave[digest]
	r.mu.Unlock()
	if h == nil {
		return false
	}
	r.leave(h, err)
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.hosts[0] != h
}

func (h *host) login(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.in {
		return nil
	}
	auth := cmp.Or(h.auth, authn.Anonymous)
	if h.auth == nil && h.keychain != nil {
		var err error
		if auth, err = authn.Resolve(ctx, h.keychain, h.repo); err != nil {
			return fmt.Errorf("log in to %s: %w", h.repo.RegistryStr(), err)
		}
	}
	t, err := transport.NewWithContext(ctx, h.repo.Registry, auth, h.client.Transport,
		[]string{h.repo.Scope(transport.PullScope)})
	if err == nil {
		h.client.Transport, h.in = t, true
	}
	return err
}

// hostOf is a repository's, without a port.
func hostOf(repo name.Repository) string { return (&url.URL{Host: repo.RegistryStr()}).Hostname() }

const accept = manifest.TypeIndex + ", " + manifest.TypeManifest + ", " + manifest.TypeDockerIndex + ", " +
	manifest.TypeDockerManifest

func (r *registry) manifest(ctx context.Context, digest string) (text []byte, err error) {
	err = r.ask(ctx, func(h *host) (err error) {
		if text, _, err = h.manifest(ctx, digest); err != nil {
			return err
		}
		if got := manifest.Digest(text); got != digest {
			return &flatten.DigestError{What: "manifest", Want: digest, Got: got}
		}
		return nil
	})
	return text, err
}

// manifest also returns what the registry calls it, a media type.
func (h *host) manifest(ctx context.Context, identifier string) (text []byte, kind string, err error) {
	resp, err := h.do(ctx, http.MethodGet, "manifests/"+identifier, http.Header{"Accept": {accept}})
	if err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	text, err = readSmall(resp.Body)
	return text, resp.Header.Get("Content-Type"), err
}

// signatures are those of a manifest, from the first host that has some.
func (r *registry) signatures(ctx context.Context, digest string) (all []trust.Signature, err error) {
	r.mu.Lock()
	hosts := slices.Clone(r.hosts)
	r.mu.Unlock()
	for _, h := range hosts {
		if err = h.login(ctx); err == nil {
			all, err = trust.Stored(ctx, digest, h.small)
		}
		if len(all) > 0 {
			return all, nil
		}
	}
	return nil, err
}

// small reads a part of the repository, nil if it is not there.
func (h *host) small(ctx context.Context, part string) (text []byte, err error) {
	resp, err := h.do(ctx, http.MethodGet, part, http.Header{"Accept": {accept}})
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	text, err = readSmall(resp.Body)
	return text, errors.Join(err, resp.Body.Close())
}

// digest is what a tag leads to, as far as the registry says so without being asked for more.
func (h *host) digest(ctx context.Context, tag string) string {
	resp, err := h.do(ctx, http.MethodHead, "manifests/"+tag, http.Header{"Accept": {accept}})
	if err != nil {
		return "" // the manifest will tell
	}
	_ = resp.Body.Close() // there is none
	return resp.Header.Get("Docker-Content-Digest")
}

func (r *registry) blob(ctx context.Context, digest string, offset int64) (body *download.Body, err error) {
	err = r.ask(ctx, func(h *host) (err error) {
		body, err = download.Range(offset, "", func(header http.Header) (*http.Response, error) {
			return h.do(ctx, http.MethodGet, "blobs/"+digest, header)
		})
		if err == nil {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.gave[digest] = h
		}
		return err
	})
	return body, err
}

// do asks for a part of the repository. The caller closes the response's body.
func (h *host) do(ctx context.Context, method, part string, header http.Header) (*http.Response, error) {
	// The transport knows whether it is to be plain HTTP.
	url := fmt.Sprintf("https://%s/v2/%s/%s", h.repo.RegistryStr(), h.repo.RepositoryStr(), part)
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	// What is sent packed by the way would be unpacked by the way, and have another digest.
	req.Header.Set("Accept-Encoding", "identity")
	resp, err := h.client.Do(req)
	if err != nil {
		return nil, err
	}
	good := []int{http.StatusOK}
	if header.Get("Range") != "" {
		good = append(good, http.StatusPartialContent, http.StatusRequestedRangeNotSatisfiable)
	}
	if err := transport.CheckError(resp, good...); err != nil {
		err = errors.Join(err, resp.Body.Close())
		if resp.StatusCode == http.StatusNotFound {
			err = fmt.Errorf("%w: %w", ErrNotFound, err)
		}
		return nil, err
	}
	return resp, nil
}

func (r *registry) Close() error {
	for _, idle := range r.idle {
		idle()
	}
	return nil
}

// here says whether a host is this machine.
func here(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
