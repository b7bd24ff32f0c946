package login_test

import (
	"archive/tar"
	"encoding/base64"
	"errors"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"

	"push.rocks/smartvm/image/login"
	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/ocitest"
)

// keychain reads a file of a text, and notes its warnings.
func keychain(t testing.TB, text string) (k *login.Keychain, file string, warnings *strings.Builder) {
	t.Helper()
	file, warnings = filepath.Join(t.TempDir(), "config.json"), &strings.Builder{}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return &login.Keychain{Files: []string{file}, Log: slog.New(slog.NewTextHandler(warnings, nil))}, file, warnings
}

// helper puts a credential helper into the path.
func helper(t testing.TB, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte("#!/bin/sh\n"+script),
		0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func user(t testing.TB, k *login.Keychain, repository string) (*authn.AuthConfig, error) {
	t.Helper()
	repo, err := name.NewRepository(repository)
	if err != nil {
		t.Fatal(err)
	}
	a, err := authn.Resolve(t.Context(), k, repo)
	if err != nil {
		return nil, err
	}
	c, err := authn.Authorization(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	return c, nil
}

func basic(s string) string { return `{"auth":"` + base64.StdEncoding.EncodeToString([]byte(s)) + `"}` }

// What docker and podman have written is found, the narrowest first.
func TestKeychain_Files(t *testing.T) {
	k, _, warnings := keychain(t, `{"auths":{"https://index.docker.io/v1/":`+basic("hub:p")+`,"r.test/team":`+
		basic("team:p")+`,"r.test":`+basic("all:p")+
		`,"https://old.test/v1/":`+basic("old:p")+`,"empty.test":{}}}`)
	dir := t.TempDir()
	second := filepath.Join(dir, "auth.json")
	if err := os.WriteFile(second, []byte(`{"auths":{"r.test":`+basic("second:p")+`,"empty.test":`+basic("second:p")+`}}`),
		0o600); err != nil {
		t.Fatal(err)
	}
	k.Files = append([]string{dir, filepath.Join(dir, "none.json")}, append(k.Files, second)...)
	for repository, want := range map[string]string{
		"debian": "hub", "r.test/team/app": "team", "r.test/app": "all", "old.test/app": "old", "empty.test/app": "second",
		"other.test/app": "",
	} {
		got, err := user(t, k, repository)
		if err != nil || got.Username != want {
			t.Errorf("%s: %+v, %v, want the user %q", repository, got, err, want)
		}
	}
	if !strings.Contains(warnings.String(), dir) {
		t.Errorf("nothing is said of a directory in place of a file: %s", warnings)
	}
	podman, _, _ := keychain(t, `{"auths":{"docker.io":`+basic("podman:p")+`}}`)
	if got, err := user(t, podman, "debian"); err != nil || got.Username != "podman" {
		t.Errorf("%+v, %v", got, err)
	}
	broken, file, _ := keychain(t, `{"auths":`)
	if _, err := user(t, broken, "debian"); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("%v, want the file's name", err)
	}
}

func TestKeychain_Helpers(t *testing.T) {
	const file = `{"auths":{"r.test":{}},"credHelpers":{"r.test":"test","index.docker.io":"test"}}`
	for _, c := range []struct {
		name, script string
		want         authn.AuthConfig
		err          string
	}{
		{
			name: "a password", script: `echo "{\"ServerURL\":\"$(cat)\",\"Username\":\"me\",\"Secret\":\"p\"}"`,
			want: authn.AuthConfig{Username: "me", Password: "p"},
		},
		{name: "a token", script: `echo '{"Username":"<token>","Secret":"t"}'`, want: authn.AuthConfig{IdentityToken: "t"}},
		{
			name: "what it is asked", script: `echo "{\"Username\":\"$1\",\"Secret\":\"$(cat)\"}"`,
			want: authn.AuthConfig{Username: "get", Password: "r.test"},
		},
		{name: "none", script: `echo "credentials not found in native keychain"; exit 1`},
		{
			name: "rubbish", script: `echo rubbish`,
			err: "credential helper docker-credential-test: what it printed is no login",
		},
		{name: "nothing", script: ``, err: "credential helper docker-credential-test: what it printed is no login"},
		{name: "a failure", script: `echo "the keychain is locked" >&2; exit 3`, err: "the keychain is locked"},
		{name: "never", script: `exec sleep 100`, err: "credential helper docker-credential-test: it did not answer in time"},
		{
			name: "without end", script: `exec cat /dev/zero`,
			err: "credential helper docker-credential-test: it did not answer in time",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			helper(t, c.script)
			k, path, warnings := keychain(t, file)
			if strings.HasPrefix(c.err, "credential helper docker-credential-test: it did not") {
				k.Timeout = 100 * time.Millisecond
			}
			got, err := user(t, k, "r.test/app")
			if c.err != "" {
				var h *login.HelperError
				if err == nil || !strings.Contains(err.Error(), c.err) || !errors.As(err, &h) || h.File != path {
					t.Errorf("%v, want %q of %s", err, c.err, path)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, *got); diff != "" {
				t.Error(diff)
			}
			if warnings.Len() > 0 {
				t.Error(warnings)
			}
		})
	}
}

// A helper that is not installed keeps no public image away.
func TestKeychain_MissingHelper(t *testing.T) {
	dir := t.TempDir()
	d, err := ocitest.Add(dir, "amd64", func(*tar.Writer) error { return nil })
	if err == nil {
		err = ocitest.Tag(dir, "1", d)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(ocitest.Registry(dir))
	defer s.Close()
	k, file, warnings := keychain(t, `{"auths":{},"credsStore":"not-there"}`)
	i, err := oci.Resolve(t.Context(), strings.TrimPrefix(s.URL, "http://")+"/app:1", oci.Options{Keychain: k})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	for _, want := range []string{file, "docker-credential-not-there"} {
		if !strings.Contains(warnings.String(), want) {
			t.Errorf("the warning %q does not name %s", warnings, want)
		}
	}
}

func TestFiles(t *testing.T) {
	lookup := func(env map[string]string) func(string) (string, bool) {
		return func(key string) (string, bool) { v, ok := env[key]; return v, ok }
	}
	for _, c := range []struct {
		env  map[string]string
		want []string
	}{
		{nil, nil},
		{map[string]string{"HOME": "/h"}, []string{"/h/.docker/config.json", "/h/.config/containers/auth.json"}},
		{
			map[string]string{
				"HOME": "/h", "DOCKER_CONFIG": "/d", "REGISTRY_AUTH_FILE": "/f", "XDG_RUNTIME_DIR": "/r",
				"XDG_CONFIG_HOME": "/c",
			},
			[]string{"/d/config.json", "/f", "/r/containers/auth.json", "/c/containers/auth.json"},
		},
	} {
		if diff := cmp.Diff(c.want, login.Files(lookup(c.env))); diff != "" {
			t.Error(diff)
		}
	}
}
