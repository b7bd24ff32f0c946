package registries_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"maps"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"

	"push.rocks/smartvm/image/registries"
)

// write makes files and the directories that they are in.
func write(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for n, text := range files {
		path := filepath.Join(dir, n)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
}

func read(t testing.TB, text string) *registries.Config {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, map[string]string{"registries.conf": text})
	c, err := registries.Read(filepath.Join(dir, "registries.conf"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// places are those of a reference as texts, "!" for insecure ones.
func places(t testing.TB, c *registries.Config, ref string) (all []string, err error) {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	found, err := c.Places(r)
	for _, p := range found {
		text := p.Repository.Name()
		if p.Insecure {
			text += "!"
		}
		all = append(all, text)
	}
	return all, err
}

func TestConfig_Places(t *testing.T) {
	c := read(t, `
short-name-mode = "enforcing"
[[registry]]
prefix = "docker.io"
location = "docker.io"
[[registry.mirror]]
location = "mirror.test/hub"
[[registry.mirror]]
location = "lan.test:5000"
insecure = true
[[registry]]
prefix = "docker.io/library/secret"
blocked = true
[[registry]]
location = "plain.test:5000"
insecure = true
[[registry]]
prefix = "moved.test/old"
location = "new.test/place"
[[registry]]
prefix = "*.wild.test"
insecure = true
[[registry]]
prefix = "far.wild.test"
[[registry]]
prefix = "*.moved.test"
location = "new.test"
[[registry]]
location = "pinned.test"
mirror-by-digest-only = true
[[registry.mirror]]
location = "mirror.test/pinned"
[[registry]]
location = "mixed.test"
[[registry.mirror]]
location = "tags.test"
pull-from-mirror = "tag-only"
[[registry.mirror]]
location = "digests.test"
pull-from-mirror = "digest-only"
[[registry]]
prefix = "mixed.test/app:evil"
blocked = true
`)
	digest := "@sha256:" + strings.Repeat("0", 64)
	for ref, want := range map[string][]string{
		"debian:12": {
			"mirror.test/hub/library/debian", "lan.test:5000/library/debian!",
			"index.docker.io/library/debian",
		},
		"docker.io/a/b": {"mirror.test/hub/a/b", "lan.test:5000/a/b!", "index.docker.io/a/b"},
		"secretive": {
			"mirror.test/hub/library/secretive", "lan.test:5000/library/secretive!",
			"index.docker.io/library/secretive",
		},
		"plain.test:5000/a":      {"plain.test:5000/a!"},
		"plain.test/a":           {"plain.test/a"},
		"other.test/a":           {"other.test/a"},
		"moved.test/old/a:1":     {"new.test/place/a"},
		"moved.test/older":       {"moved.test/older"},
		"a.wild.test:443/b":      {"a.wild.test:443/b!"},
		"far.wild.test/b":        {"far.wild.test/b"},
		"wild.test/b":            {"wild.test/b"},
		"a.moved.test/b/c":       {"new.test/b/c"},
		"pinned.test/a:1":        {"pinned.test/a"},
		"pinned.test/a" + digest: {"mirror.test/pinned/a", "pinned.test/a"},
		"mixed.test/a:1":         {"tags.test/a", "mixed.test/a"},
		"mixed.test/a" + digest:  {"digests.test/a", "mixed.test/a"},
		"mixed.test/app:good":    {"tags.test/app", "mixed.test/app"},
	} {
		got, err := places(t, c, ref)
		if err != nil {
			t.Errorf("%s: %v", ref, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", ref, diff)
		}
	}
	for _, ref := range []string{"secret", "docker.io/library/secret:2", "secret" + digest, "mixed.test/app:evil"} {
		if got, err := places(t, c, ref); !errors.Is(err, registries.ErrBlocked) ||
			!strings.Contains(err.Error(), "registries.conf") {
			t.Errorf("%s: %v, %v, want ErrBlocked", ref, got, err)
		}
	}
	if got, err := places(t, &registries.Config{}, "debian"); err != nil || len(got) != 1 ||
		got[0] != "index.docker.io/library/debian" {
		t.Errorf("without a configuration: %v, %v", got, err)
	}
}

func TestConfig_Expand(t *testing.T) {
	aliases := read(t,
		"unqualified-search-registries = [\"a.test\", \"docker.io\"]\n[aliases]\n\"tool\" = \"quay.io/team/tool\"\n\"team/x\" = \"b.test/x\"\n\"off\" = \"\"\n")
	one := read(t, `unqualified-search-registries = ["a.test"]`)
	for _, c := range []struct {
		conf       *registries.Config
		text, want string
	}{
		{aliases, "tool", "quay.io/team/tool"},
		{aliases, "tool:2", "quay.io/team/tool:2"},
		{aliases, "tool@sha256:0", "quay.io/team/tool@sha256:0"},
		{aliases, "team/x:1", "b.test/x:1"},
		{aliases, "off", "off"},
		{aliases, "debian:12", "debian:12"},
		{aliases, "localhost/tool", "localhost/tool"},
		{aliases, "host:5000/tool", "host:5000/tool"},
		{one, "debian:12", "a.test/debian:12"},
		{one, "b.test/debian", "b.test/debian"},
		{&registries.Config{}, "debian", "debian"},
	} {
		if got := c.conf.Expand(c.text); got != c.want {
			t.Errorf("%s: %s, want %s", c.text, got, c.want)
		}
	}
}

// The user's file counts in place of the machine's; what lies beside both is added, the user's
// last.
func TestRead(t *testing.T) {
	dir := t.TempDir()
	at := func(n string) string { return filepath.Join(dir, n) }
	insecure := func(host string, yes bool) string {
		return "[[registry]]\nlocation = \"" + host + "\"\ninsecure = " +
			map[bool]string{true: "true", false: "false"}[yes] + "\n"
	}
	write(t, dir, map[string]string{
		"etc.conf": insecure("etc.test", true), "home.conf": insecure("home.test", true) + insecure("x.test", true),
		"etc.conf.d/1.conf":  insecure("d.test", true) + insecure("y.test", true),
		"etc.conf.d/2.conf":  insecure("y.test", false),
		"home.conf.d/1.conf": insecure("x.test", false), "etc.conf.d/3.txt": "no TOML",
	})
	c, err := registries.Read(at("none.conf"), at("home.conf"), at("etc.conf"))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, host := range []string{"etc.test", "home.test", "x.test", "y.test", "d.test"} {
		all, err := places(t, c, host+"/a")
		if err != nil {
			t.Fatal(err)
		}
		got[host] = strings.HasSuffix(all[0], "!")
	}
	if diff := cmp.Diff(
		map[string]bool{"etc.test": false, "home.test": true, "x.test": false, "y.test": false, "d.test": true},
		got); diff != "" {
		t.Error(diff)
	}
	if _, err := registries.Read(at("none.conf")); err != nil {
		t.Errorf("without a file: %v", err)
	}
	for n, text := range map[string]string{
		"bad.conf": "[[registry]", "empty.conf": "[[registry]]\n", "type.conf": "unqualified-search-registries = 5",
		"large.conf": "#" + strings.Repeat("x", 1<<20),
	} {
		write(t, dir, map[string]string{n: text})
		if _, err := registries.Read(at(n)); err == nil || !strings.Contains(err.Error(), n) {
			t.Errorf("%s: %v, want an error with its name", n, err)
		}
	}
	c = read(t, "[[registry]]\nprefix = \"a.test\"\nlocation = \"b.test/BIG\"\n")
	if got, err := places(t, c, "a.test/x"); err == nil {
		t.Errorf("%v", got)
	}
}

func TestFiles(t *testing.T) {
	lookup := func(env map[string]string) func(string) (string, bool) {
		return func(key string) (string, bool) { v, ok := env[key]; return v, ok }
	}
	const system = "/etc/containers/registries.conf"
	for _, c := range []struct {
		env  map[string]string
		want []string
	}{
		{nil, []string{system}},
		{map[string]string{"HOME": "/h"}, []string{"/h/.config/containers/registries.conf", system}},
		{map[string]string{"HOME": "/h", "XDG_CONFIG_HOME": "/c"}, []string{"/c/containers/registries.conf", system}},
		{map[string]string{"HOME": "/h", "CONTAINERS_REGISTRIES_CONF": "/x"}, []string{"/x"}},
	} {
		if diff := cmp.Diff(c.want, registries.Files(lookup(c.env))); diff != "" {
			t.Errorf("%v: %s", maps.Collect(maps.All(c.env)), diff)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add("[[registry]]\nprefix = \"*.a\"\n[[registry.mirror]]\nlocation = \"x\"\n", "b.a/c")
	f.Fuzz(func(t *testing.T, text, ref string) {
		path := filepath.Join(t.TempDir(), "registries.conf")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := registries.Read(path)
		if err != nil {
			return
		}
		if r, err := name.ParseReference(c.Expand(ref)); err == nil {
			if all, err := c.Places(r); err == nil && len(all) == 0 {
				t.Error("there is nowhere to ask")
			}
		}
	})
}

// What a command line says of certificates comes before what files say.
func TestConfig_TLSVerify(t *testing.T) {
	c := read(t,
		"[[registry]]\nlocation = \"bad.test\"\ninsecure = true\n[[registry.mirror]]\nlocation = \"mirror.test\"\n")
	for verify, want := range map[*bool]map[string][]string{
		nil:        {"bad.test/a:1": {"mirror.test/a", "bad.test/a!"}, "debian:12": {"index.docker.io/library/debian"}},
		new(true):  {"bad.test/a:1": {"mirror.test/a", "bad.test/a"}, "debian:12": {"index.docker.io/library/debian"}},
		new(false): {"bad.test/a:1": {"mirror.test/a!", "bad.test/a!"}, "debian:12": {"index.docker.io/library/debian!"}},
	} {
		c.TLSVerify = verify
		for ref, want := range want {
			got, err := places(t, c, ref)
			if err != nil || cmp.Diff(want, got) != "" {
				t.Errorf("%s: %q, %v, want %q", ref, got, err, want)
			}
		}
	}
}

// What we are known by is a certificate with its key, of a directory for all registries or for one.
func TestConfig_Transport(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	of := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, of, of, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certificate := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	files := map[string]string{
		"client.cert": certificate,
		"client.key":  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})), "README": "x",
	}
	all, one := t.TempDir(), t.TempDir()
	write(t, all, files)
	write(t, filepath.Join(one, "registry.test"), files)
	repository, err := name.NewRepository("registry.test/a")
	if err != nil {
		t.Fatal(err)
	}
	place := registries.Place{Repository: repository}
	for _, c := range []*registries.Config{{CertDir: all}, {CertDirs: []string{"/nonexistent", one}}} {
		transport, err := c.Transport(&http.Transport{}, place)
		if err != nil || len(transport.TLSClientConfig.Certificates) != 1 || transport.TLSClientConfig.RootCAs != nil {
			t.Errorf("%+v: %+v, %v", c, transport, err)
		}
	}
	other := registries.Place{Repository: name.MustParseReference("other.test/a:1").Context()}
	if transport, err := (&registries.Config{CertDirs: []string{one}}).Transport(&http.Transport{}, other); err != nil ||
		len(transport.TLSClientConfig.Certificates) > 0 {
		t.Errorf("another registry is told who we are: %v", err)
	}
	if err := os.Remove(filepath.Join(all, "client.key")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*registries.Config{{CertDir: all}, {CertDir: "/nonexistent"}} {
		if _, err := c.Transport(&http.Transport{}, place); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	write(t, all, map[string]string{"client.key": "rubbish"})
	if _, err := (&registries.Config{CertDir: all}).Transport(&http.Transport{}, place); err == nil ||
		!strings.Contains(err.Error(), "client.cert") {
		t.Errorf("no key: %v", err)
	}
}
