// Package registry is the part of the command line that says how registries are asked, and which
// images are allowed.
package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"push.rocks/smartvm/image/login"
	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/registries"
	"push.rocks/smartvm/image/trust"
)

// Flags are settings of registries.
type Flags struct {
	mirrors        []string
	policy         string
	creds, certDir string
	tlsVerify      *bool
	login          authn.Authenticator
	lookup         func(string) (string, bool)
}

// Global adds those that every command has, given how to look up environment variables.
func (r *Flags) Global(f *pflag.FlagSet, lookup func(string) (string, bool)) {
	r.lookup = lookup
	f.StringSliceVar(&r.mirrors, "registry-mirror", nil,
		"registry `host` to ask first; may be repeated [$SMARTVM_REGISTRY_MIRROR]")
	f.StringVar(&r.policy, "signature-policy", "",
		"policy.json of which images are allowed, a `file`; /etc/containers's or the user's without it [$SMARTVM_SIGNATURE_POLICY]")
}

// Pull adds those of commands that fetch images.
func (r *Flags) Pull(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&r.creds, "creds", "", "`login` for the image's registry, USER:PASSWORD; USER alone asks for the password")
	f.StringVar(&r.certDir, "cert-dir", "",
		"`dir` with certificates of registries' authorities (*.crt) and for us (*.cert, *.key)")
	f.BoolFunc("tls-verify", "false for registries without TLS, or with a certificate that nobody vouches for",
		func(text string) error {
			verify := text == "true"
			if !verify && text != "false" {
				return errors.New("want true or false")
			}
			r.tlsVerify = &verify
			return nil
		})
}

// Finish asks the environment about those that were not given, and who types for a password that is
// missing.
func (r *Flags) Finish(ctx context.Context, in io.Reader, out io.Writer) error {
	if mirrors, _ := r.lookup("SMARTVM_REGISTRY_MIRROR"); len(r.mirrors) == 0 && mirrors != "" {
		r.mirrors = strings.Split(mirrors, ",")
	}
	policy, _ := r.lookup("SMARTVM_SIGNATURE_POLICY")
	r.policy = cmp.Or(r.policy, policy)
	if r.creds == "" {
		return nil
	}
	user, password, whole := strings.Cut(r.creds, ":")
	if user == "" {
		return errors.New("--creds: want USER:PASSWORD")
	}
	if !whole {
		terminal, ok := in.(*os.File)
		if !ok || !term.IsTerminal(int(terminal.Fd())) {
			return errors.New("--creds: want USER:PASSWORD, or a terminal to ask for the password")
		}
		var err error
		if password, err = ask(ctx, terminal, out, "Password of "+user+": "); err != nil {
			return fmt.Errorf("--creds: %w", err)
		}
	}
	r.login = &authn.Basic{Username: user, Password: password}
	return nil
}

// ask reads what nobody is to see. Who ends ctx gets the terminal back as it was; the reader goes
// with the program.
func ask(ctx context.Context, terminal *os.File, out io.Writer, prompt string) (string, error) {
	before, err := term.GetState(int(terminal.Fd()))
	if err != nil {
		return "", err
	}
	fmt.Fprint(out, prompt)
	defer fmt.Fprintln(out)
	type answer struct {
		text []byte
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		text, err := term.ReadPassword(int(terminal.Fd()))
		answers <- answer{text, err}
	}()
	select {
	case a := <-answers:
		return string(a.text), a.err
	case <-ctx.Done():
		return "", errors.Join(context.Cause(ctx), term.Restore(int(terminal.Fd()), before))
	}
}

// Options are what the flags say, and this machine and its user.
func (r *Flags) Options(log *slog.Logger) oci.Options {
	conf := registries.Default(r.lookup)
	o := oci.Options{
		Keychain: &login.Keychain{Files: login.Files(r.lookup), Log: log}, Login: r.login, Mirrors: r.mirrors,
		Trust: trust.Default(r.lookup),
		Registries: func() (*registries.Config, error) {
			c, err := conf()
			if err == nil {
				c.CertDir, c.TLSVerify = r.certDir, r.tlsVerify
			}
			return c, err
		},
	}
	if r.policy != "" {
		o.Trust = func() (*trust.Policy, error) { return trust.Load(r.policy) }
	}
	return o
}
