// Package login finds the passwords of registries where docker and podman keep them: in files, and
// with credential helpers.
//
// Helpers are programs that somebody has installed, or has not: a missing one means no password,
// with a warning, and one that hangs is ended.
package login

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"

	"push.rocks/smartvm/internal/hint"
)

const (
	// DefaultTimeout is how long a helper may take: it may ask a person.
	DefaultTimeout = time.Minute

	maxFile   = 4 << 20 // bytes
	maxAnswer = 1 << 20 // bytes of a helper's
	waitDelay = time.Second
)

// Keychain looks for passwords. It is an authn.Keychain, safe for concurrent use.
type Keychain struct {
	// Files are read in this order until one has a login for a registry. Those that are not there are
	// left out.
	Files []string
	// Timeout is how long a helper may take. Default: DefaultTimeout.
	Timeout time.Duration
	// Log gets warnings of files that cannot be read and of helpers that are missing. Nil: they are
	// discarded.
	Log *slog.Logger
}

// Files are where docker and podman keep logins, given how to look up environment variables.
func Files(lookup func(string) (string, bool)) (all []string) {
	get := func(key string) string { value, _ := lookup(key); return value }
	add := func(dir string, rest ...string) {
		if dir != "" {
			all = append(all, filepath.Join(append([]string{dir}, rest...)...))
		}
	}
	home := get("HOME")
	if dir := get("DOCKER_CONFIG"); dir != "" {
		add(dir, config.ConfigFileName)
	} else {
		add(home, ".docker", config.ConfigFileName)
	}
	add(get("REGISTRY_AUTH_FILE"))
	add(get("XDG_RUNTIME_DIR"), "containers", "auth.json")
	if dir := get("XDG_CONFIG_HOME"); dir != "" {
		add(dir, "containers", "auth.json")
	} else {
		add(home, ".config", "containers", "auth.json")
	}
	return all
}

// Resolve is ResolveContext without an end.
func (k *Keychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	return k.ResolveContext(context.Background(), target)
}

// ResolveContext returns what to log in to a registry or a repository with, authn.Anonymous if
// nothing is known. Errors are *HelperError and those of files that cannot be understood.
func (k *Keychain) ResolveContext(ctx context.Context, target authn.Resource) (authn.Authenticator, error) {
	for _, path := range k.Files {
		found, err := k.inFile(ctx, path, target)
		if err != nil {
			return nil, err
		}
		if found != (types.AuthConfig{}) {
			return authn.FromConfig(authn.AuthConfig{
				Username: found.Username, Password: found.Password, Auth: found.Auth,
				IdentityToken: found.IdentityToken, RegistryToken: found.RegistryToken,
			}), nil
		}
	}
	return authn.Anonymous, nil
}

func (k *Keychain) warn(text string, args ...any) {
	if k.Log != nil {
		k.Log.Warn(text, args...)
	}
}

func (k *Keychain) inFile(ctx context.Context, path string, target authn.Resource) (types.AuthConfig, error) {
	c, err := k.read(path)
	if c == nil || err != nil {
		return types.AuthConfig{}, err
	}
	server := target.RegistryStr()
	helper, ok := c.CredentialHelpers[server]
	if !ok {
		helper = c.CredentialsStore
	}
	if server == name.DefaultRegistry {
		server = authn.DefaultAuthKey
	}
	if helper != "" {
		found, err := k.ask(ctx, helper, server)
		switch {
		case errors.Is(err, exec.ErrNotFound):
			k.warn("credential helper is missing, going on without", "file", path, "helper", program(helper), "registry",
				target.RegistryStr())
		case err != nil:
			return types.AuthConfig{}, hint.Add(&HelperError{File: path, Helper: program(helper), Err: err},
				"%s names the helper; DOCKER_CONFIG=/nonexistent goes without its logins", path)
		case found != (types.AuthConfig{}):
			return found, nil
		}
	}
	// What is left of the file is read without helpers.
	c.CredentialHelpers, c.CredentialsStore = nil, ""
	for _, key := range keys(target, server) {
		found, ok := c.AuthConfigs[key]
		if !ok {
			if found, err = c.GetAuthConfig(key); err != nil {
				return types.AuthConfig{}, fmt.Errorf("read logins in %s: %w", path, err)
			}
		}
		found.ServerAddress = "" // that is always there
		if found != (types.AuthConfig{}) {
			return found, nil
		}
	}
	return types.AuthConfig{}, nil
}

// keys are what files may call a target, the narrowest first: podman has logins of parts of a
// registry, and its own name of Docker Hub.
func keys(target authn.Resource, server string) (all []string) {
	whole := target.String()
	for end := len(whole); end > len(target.RegistryStr()); end = strings.LastIndexByte(whole[:end], '/') {
		all = append(all, whole[:end])
	}
	if all = append(all, server); server == authn.DefaultAuthKey {
		all = append(all, "docker.io")
	}
	return all
}

// read returns nil for a file that is not there, or that may not be read.
func (k *Keychain) read(path string) (c *configfile.ConfigFile, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		defer f.Close()
		var fi fs.FileInfo
		if fi, err = f.Stat(); err == nil && !fi.Mode().IsRegular() {
			err = errors.New("it is no file")
		}
	}
	if err != nil {
		k.warn("logins cannot be read, going on without", "file", path, "err", err)
		return nil, nil
	}
	if c, err = config.LoadFromReader(io.LimitReader(f, maxFile)); err != nil {
		return nil, hint.Add(fmt.Errorf("read logins in %s: %w", path, err), "DOCKER_CONFIG=/nonexistent goes without")
	}
	return c, nil
}

// HelperError says that a credential helper was of no use.
type HelperError struct {
	File   string // that names the helper
	Helper string // the program
	Err    error
}

func (e *HelperError) Error() string {
	return fmt.Sprintf("credential helper %s: %v", e.Helper, e.Err)
}

func (e *HelperError) Unwrap() error { return e.Err }

// errSlow says that a helper took too long.
var errSlow = errors.New("it did not answer in time")

func program(helper string) string { return "docker-credential-" + helper }

// ask asks a helper: https://github.com/docker/docker-credential-helpers#development. It returns
// nothing if the helper knows nothing.
func (k *Keychain) ask(ctx context.Context, helper, server string) (types.AuthConfig, error) {
	if strings.ContainsRune(helper, filepath.Separator) {
		return types.AuthConfig{}, errors.New("its name is a path")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, cmp.Or(k.Timeout, DefaultTimeout), errSlow)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(helper), "get")
	cmd.WaitDelay = waitDelay // what it has started may keep its output open
	cmd.Stdin = strings.NewReader(server)
	var out, complaint limited
	cmd.Stdout, cmd.Stderr = &out, &complaint
	err := cmd.Run()
	if ctx.Err() != nil {
		return types.AuthConfig{}, context.Cause(ctx)
	}
	text := strings.TrimSpace(out.String())
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		// Helpers tell by these texts that they have no login, and by others what went wrong.
		if strings.Contains(text, "credentials not found") || strings.Contains(text, "no credentials") {
			return types.AuthConfig{}, nil
		}
		return types.AuthConfig{}, fmt.Errorf("%.200q: %w", cmp.Or(text, strings.TrimSpace(complaint.String())), err)
	}
	if err != nil {
		return types.AuthConfig{}, err
	}
	// What it printed may be a password, so it is not shown.
	var answer struct{ Username, Secret string }
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return types.AuthConfig{}, errors.New("what it printed is no login")
	}
	if answer.Username == "<token>" {
		return types.AuthConfig{IdentityToken: answer.Secret}, nil
	}
	return types.AuthConfig{Username: answer.Username, Password: answer.Secret}, nil
}

// limited keeps the beginning of what is written.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	l.Buffer.Write(p[:min(len(p), maxAnswer-l.Len())])
	return len(p), nil
}
