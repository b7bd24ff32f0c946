// Package registries reads what the tools of podman are told of registries: mirrors, other places,
// those that are blocked or have no certificates, and what short names stand for.
// https://github.com/containers/image/blob/main/docs/containers-registries.conf.5.md
package registries

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/pelletier/go-toml/v2"

	"push.rocks/smartvm/internal/atomicfile"
)

const (
	maxFile  = 1 << 20 // bytes
	maxFiles = 1024
)

// ErrBlocked says that the configuration forbids a registry or a part of it.
var ErrBlocked = errors.New("blocked")

// Config is what the files say. The zero value says nothing.
type Config struct {
	// CertDirs have directories of registries' names, with their ports if any; the "*.crt" in these
	// are certificates of authorities that vouch for the registry, "*.cert" and "*.key" of one name
	// what we are known by there.
	CertDirs []string
	// CertDir has such files for every registry.
	CertDir string
	// TLSVerify says of every registry whether somebody must vouch for its certificate. Nil: the files
	// say it.
	TLSVerify *bool

	search   []string
	aliases  map[string]string
	registry []registry
}

// file is one, as far as it matters here.
type file struct {
	Search   []string          `toml:"unqualified-search-registries"`
	Aliases  map[string]string `toml:"aliases"`
	Registry []registry        `toml:"registry"`
}

// registry is what is said of references that begin with a prefix.
type registry struct {
	place
	Prefix       string   `toml:"prefix"`
	Blocked      bool     `toml:"blocked"`
	ByDigestOnly bool     `toml:"mirror-by-digest-only"`
	Mirrors      []mirror `toml:"mirror"`

	path string // of the file
}

type place struct {
	Location string `toml:"location"`
	Insecure bool   `toml:"insecure"`
}

type mirror struct {
	place
	Pull string `toml:"pull-from-mirror"`
}

// Files are the configuration of a user, given how to look up environment variables: the first that
// is there counts, and then all that end in ".conf" in the directories of the same names with ".d".
func Files(lookup func(string) (string, bool)) []string {
	if path, ok := lookup("CONTAINERS_REGISTRIES_CONF"); ok && path != "" {
		return []string{path}
	}
	all := []string{"/etc/containers/registries.conf"}
	home, _ := lookup("HOME")
	if dir, ok := lookup("XDG_CONFIG_HOME"); ok && filepath.IsAbs(dir) {
		all = append([]string{filepath.Join(dir, "containers", "registries.conf")}, all...)
	} else if home != "" {
		all = append([]string{filepath.Join(home, ".config", "containers", "registries.conf")}, all...)
	}
	return all
}

// CertDirs are where docker and podman have certificates of registries.
func CertDirs(lookup func(string) (string, bool)) []string {
	all := []string{"/etc/containers/certs.d", "/etc/docker/certs.d"}
	if home, ok := lookup("HOME"); ok && home != "" {
		all = append([]string{filepath.Join(home, ".config", "containers", "certs.d")}, all...)
	}
	return all
}

// Default reads the files of this machine and its user when it is called.
func Default(lookup func(string) (string, bool)) func() (*Config, error) {
	return func() (*Config, error) {
		c, err := Read(Files(lookup)...)
		if err == nil {
			c.CertDirs = CertDirs(lookup)
		}
		return c, err
	}
}

// Read reads the first of paths that is there, and then what the directories beside them hold, of
// which later ones, and those of earlier paths, have the last word. Files that are not there say
// nothing. Errors name the file.
func Read(paths ...string) (*Config, error) {
	c := &Config{aliases: map[string]string{}}
	for _, path := range paths {
		err := c.add(path)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	for _, path := range slices.Backward(paths) {
		entries, err := os.ReadDir(path + ".d")
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil && len(entries) > maxFiles {
			err = fmt.Errorf("more than %d files", maxFiles)
		}
		if err != nil {
			return nil, fmt.Errorf("read registries: %w", err)
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".conf") {
				if err := c.add(filepath.Join(path+".d", e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return nil, err
				}
			}
		}
	}
	return c, nil
}

// add reads a file, which has the last word.
func (c *Config) add(path string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("read registries: %s: %w", path, err)
		}
	}()
	text, err := readFile(path)
	if err != nil {
		return err
	}
	var f file
	if err := toml.Unmarshal(text, &f); err != nil {
		return err
	}
	if f.Search != nil {
		c.search = f.Search
	}
	for short, full := range f.Aliases {
		c.aliases[short] = full
	}
	for _, r := range f.Registry {
		r.path = path
		r.Prefix = strings.TrimSuffix(cmp.Or(r.Prefix, r.Location), "/")
		if r.Prefix == "" {
			return errors.New("a registry has neither prefix nor location")
		}
		if r.Location == "" && !strings.HasPrefix(r.Prefix, "*.") {
			r.Location = r.Prefix
		}
		c.registry = slices.DeleteFunc(c.registry, func(other registry) bool { return other.Prefix == r.Prefix })
		c.registry = append(c.registry, r)
	}
	return nil
}

// Expand returns what a reference without a registry stands for, the reference itself if nothing is
// said of it. A list of registries to search counts if it has only one: more would let whoever is
// first give their own image.
func (c *Config) Expand(text string) string {
	if first, _, ok := strings.Cut(text, "/"); ok && (strings.ContainsAny(first, ".:") || first == "localhost") {
		return text
	}
	short, suffix := text, ""
	if i := strings.IndexAny(text, ":@"); i >= 0 {
		short, suffix = text[:i], text[i:]
	}
	switch full := c.aliases[short]; {
	case full != "":
		return full + suffix
	case len(c.search) == 1 && c.search[0] != "docker.io":
		return c.search[0] + "/" + text
	}
	return text
}

// Place is where an image can be.
type Place struct {
	Repository name.Repository
	Insecure   bool // plain HTTP, and certificates that nobody vouches for, will do
}

// Places are where to ask for an image, mirrors first; the repository itself if nothing is said of
// it. Errors are ErrBlocked and those of locations that make no repository.
func (c *Config) Places(ref name.Reference) ([]Place, error) {
	whole := strings.Replace(ref.Context().Name(), name.DefaultRegistry+"/", "docker.io/", 1)
	_, pinned := ref.(name.Digest)
	full := whole + map[bool]string{true: "@", false: ":"}[pinned] + ref.Identifier()
	var best *registry
	var rest string
	for n := range c.registry {
		r := &c.registry[n]
		tail, ok := under(whole, r.Prefix)
		if (ok || r.Prefix == full) && (best == nil || len(r.Prefix) > len(best.Prefix)) {
			best, rest = r, tail
		}
	}
	if best == nil {
		best = &registry{place: place{Location: whole}, Prefix: whole}
	}
	if best.Blocked {
		return nil, fmt.Errorf("%s is %w by %s", best.Prefix, ErrBlocked, best.path)
	}
	var all []place
	for _, m := range best.Mirrors {
		if wanted := m.Pull == "" || m.Pull == "all" || (m.Pull == "digest-only") == pinned; wanted &&
			(pinned || !best.ByDigestOnly) {
			all = append(all, place{m.Location + rest, m.Insecure})
		}
	}
	own := place{whole, best.Insecure}
	if best.Location != "" && best.Prefix != full { // of one image alone, no more is said than what is blocked or insecure
		own.Location = best.Location + rest
	}
	var places []Place
	for _, p := range append(all, own) {
		var options []name.Option
		if c.TLSVerify != nil {
			p.Insecure = !*c.TLSVerify
		}
		if p.Insecure {
			options = append(options, name.Insecure)
		}
		repo, err := name.NewRepository(p.Location, options...)
		if err != nil {
			return nil, fmt.Errorf("read registries: %s: location %.200q: %w", best.path, p.Location, err)
		}
		places = append(places, Place{repo, p.Insecure})
	}
	return places, nil
}

// under says whether a repository is one of a prefix, and what follows that.
func under(whole, prefix string) (rest string, ok bool) {
	if domain, wild := strings.CutPrefix(prefix, "*"); wild {
		host, _, _ := strings.Cut(whole, "/")
		rest = whole[len(host):]
		if !strings.Contains(domain, ":") {
			host, _, _ = strings.Cut(host, ":")
		}
		return rest, strings.HasSuffix(host, domain)
	}
	rest, ok = strings.CutPrefix(whole, prefix)
	return rest, ok && (rest == "" || rest[0] == '/')
}

// Transport is a copy of base for a place: with the certificates that are here for it, or content
// without any. Errors name the file that holds no certificate.
func (c *Config) Transport(base *http.Transport, p Place) (*http.Transport, error) {
	t := base.Clone()
	if t.TLSClientConfig == nil {
		t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	t.TLSClientConfig.InsecureSkipVerify = p.Insecure
	var dirs []string
	for _, dir := range c.CertDirs {
		dirs = append(dirs, filepath.Join(dir, p.Repository.RegistryStr()))
	}
	for _, dir := range append(dirs, c.CertDir) {
		entries, err := os.ReadDir(dir)
		if dir == "" || errors.Is(err, fs.ErrNotExist) && dir != c.CertDir {
			continue
		}
		for _, e := range entries[:min(len(entries), maxFiles)] {
			if err == nil {
				err = addCertificate(t.TLSClientConfig, filepath.Join(dir, e.Name()))
			}
		}
		if err != nil {
			return nil, fmt.Errorf("read certificates: %w", err)
		}
	}
	return t, nil
}

// addCertificate adds what a file holds, by its name.
func addCertificate(c *tls.Config, path string) error {
	ending := filepath.Ext(path)
	if ending != ".crt" && ending != ".cert" {
		return nil
	}
	text, err := readFile(path)
	if err != nil {
		return err
	}
	if ending == ".crt" {
		if c.RootCAs == nil {
			if c.RootCAs, err = x509.SystemCertPool(); err != nil {
				return err
			}
		}
		if !c.RootCAs.AppendCertsFromPEM(text) {
			return fmt.Errorf("%s holds none", path)
		}
		return nil
	}
	key, err := readFile(strings.TrimSuffix(path, ending) + ".key")
	if err != nil {
		return err
	}
	own, err := tls.X509KeyPair(text, key)
	if err != nil {
		return fmt.Errorf("%s and its key: %w", path, err)
	}
	c.Certificates = append(c.Certificates, own)
	return nil
}

// readFile reads a small one.
func readFile(path string) ([]byte, error) {
	text, err := atomicfile.Read(path, maxFile)
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", path, maxFile)
	}
	return text, err
}
