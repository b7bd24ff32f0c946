// Package trust decides by a policy.json whether an image may be used: the format of
// containers-policy.json(5) of the containers project, as podman and skopeo read it.
//
// Of its requirements there are reject, insecureAcceptAnything, and sigstoreSigned by keys. What is
// of another kind is valid, and accepts nothing: a policy that is followed by half is none.
// Signatures are read as cosign stores them, in its form of before the bundles of version 3,
// whatever a registries.d says.
package trust

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/strictjson"
)

const (
	maxPolicy = 1 << 20  // bytes
	maxKey    = 64 << 10 // bytes of a file with keys
)

// Policy says which images may be used; nil allows all. It is safe for concurrent use.
type Policy struct {
	file       string
	standard   []requirement
	transports map[string]map[string][]requirement // by transport and scope
}

// Subject is an image that is asked about.
type Subject struct {
	Transport string // "docker" for a registry, "oci", "oci-archive", "docker-archive"
	// Repository is a registry's with its host, "docker.io/library/debian", or else the absolute path
	// of a file or directory.
	Repository string
	Tag        string   // "12", or empty
	Digest     string   // that was asked for, or empty
	Manifests  []string // digests of the image's manifest and of the indexes that led to it
	// Signatures returns those of a manifest, as cosign stores them. Nil: there can be none.
	Signatures func(ctx context.Context, manifest string) ([]Signature, error)
}

// Signature is what a key's owner says of an image, with the proof.
type Signature struct {
	Payload []byte // JSON, the format "simple signing"
	Base64  string // of the payload's signature
}

// RejectedError says that the policy does not allow an image.
type RejectedError struct {
	File        string // the policy's, if it was read from one
	Scope       string // of the policy, that decided: "default", or a transport with what of it
	Requirement string // its type
	Reason      string
}

func (e *RejectedError) Error() string {
	return fmt.Sprintf("not allowed by %s (%s: %s): %s", cmp.Or(e.File, "the policy of images"), e.Scope,
		e.Requirement, e.Reason)
}

// Hint is what to do about it.
func (e *RejectedError) Hint() string {
	file := cmp.Or(e.File, "the policy")
	if e.Requirement == typeSigned {
		return fmt.Sprintf(
			"cosign sign --key KEY --new-bundle-format=false signs an image in its registry; %s says under %q whose signatures count, and needs matchRepository for cosign's", file, e.Scope)
	}
	return fmt.Sprintf(
		"%s decides under %q; a narrower scope in it can allow the image, and --signature-policy takes another file",
		file, e.Scope)
}

// document is a policy.json.
type document struct {
	Default    []json.RawMessage                       `json:"default"`
	Transports map[string]map[string][]json.RawMessage `json:"transports"`
}

// Types of requirements.
const (
	typeAny    = "insecureAcceptAnything"
	typeSigned = "sigstoreSigned"
)

// requirement is one thing that must be so.
type requirement struct {
	Type           string    `json:"type"`
	KeyPath        string    `json:"keyPath"`
	KeyPaths       []string  `json:"keyPaths"`
	KeyData        string    `json:"keyData"`  // base64 of PEM
	KeyDatas       []string  `json:"keyDatas"` // likewise
	SignedIdentity *identity `json:"signedIdentity"`
	unsupported    string    // why it accepts nothing
}

// identity says which image a signature must be about.
type identity struct {
	Type             string `json:"type"`
	DockerReference  string `json:"dockerReference"`
	DockerRepository string `json:"dockerRepository"`
	Prefix           string `json:"prefix"`
	SignedPrefix     string `json:"signedPrefix"`
}

// Load reads a policy's file.
func Load(file string) (*Policy, error) {
	data, err := readFile(file, maxPolicy)
	if err != nil {
		return nil, fmt.Errorf("read policy of images: %w", err)
	}
	p, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("read policy of images %s: %w", file, err)
	}
	p.file = file
	return p, nil
}

// Default reads the policy of this machine's user, given how to look up environment variables, when
// it is called: the user's own, or else the machine's. Where there is neither it is nil.
func Default(lookup func(string) (string, bool)) func() (*Policy, error) {
	return func() (*Policy, error) {
		files := []string{"/etc/containers/policy.json"}
		if home, _ := lookup("HOME"); home != "" {
			files = append([]string{filepath.Join(home, ".config", "containers", "policy.json")}, files...)
		}
		for _, file := range files {
			if p, err := Load(file); !errors.Is(err, fs.ErrNotExist) {
				return p, err
			}
		}
		return nil, nil
	}
}

func readFile(file string, most int64) ([]byte, error) {
	data, err := atomicfile.Read(file, most)
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("%s: more than %d bytes", file, most)
	}
	return data, err
}

// Parse reads a policy. It finds all that is wrong with it.
func Parse(data []byte) (*Policy, error) {
	d, err := strictjson.Unmarshal[document](data, maxPolicy)
	if err != nil {
		return nil, err
	}
	p := &Policy{transports: map[string]map[string][]requirement{}}
	var errs []error
	list := func(at string, raw []json.RawMessage) (all []requirement) {
		if len(raw) == 0 {
			errs = append(errs, fmt.Errorf("%s: want at least one requirement", at))
		}
		for n, r := range raw {
			parsed, err := parseRequirement(r)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s[%d]: %w", at, n, err))
			}
			all = append(all, parsed)
		}
		return all
	}
	p.standard = list("default", d.Default)
	for transport, scopes := range d.Transports {
		p.transports[transport] = map[string][]requirement{}
		for scope, raw := range scopes {
			p.transports[transport][scope] = list(fmt.Sprintf("transports.%s[%q]", transport, scope), raw)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return p, nil
}

// What others know of sigstoreSigned, and we do not.
var notHere = []string{
	"fulcio", "pki", "rekorPublicKeyPath", "rekorPublicKeyPaths", "rekorPublicKeyData",
	"rekorPublicKeyDatas",
}

func parseRequirement(raw json.RawMessage) (r requirement, err error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return r, errors.New("want an object")
	}
	var kind struct {
		Type string `json:"type"`
	}
	_ = json.Unmarshal(raw, &kind) // what it is not is refused below
	switch kind.Type {
	case "signedBy":
		return requirement{Type: kind.Type, unsupported: "signedBy (GPG) is not supported here"}, nil
	case "reject", typeAny, typeSigned:
	default:
		return r, fmt.Errorf("type %q: want reject, insecureAcceptAnything, sigstoreSigned or signedBy", kind.Type)
	}
	for _, name := range notHere {
		if _, ok := fields[name]; ok && kind.Type == typeSigned {
			return requirement{Type: kind.Type, unsupported: name + " is not supported here, keys alone are"}, nil
		}
	}
	if r, err = strictjson.Unmarshal[requirement](raw, maxPolicy); err != nil {
		return r, err
	}
	keys := 0
	for _, given := range []bool{r.KeyPath != "", len(r.KeyPaths) > 0, r.KeyData != "", len(r.KeyDatas) > 0} {
		if given {
			keys++
		}
	}
	switch {
	case r.Type != typeSigned && (keys > 0 || r.SignedIdentity != nil):
		return r, fmt.Errorf("%s takes neither keys nor signedIdentity", r.Type)
	case r.Type == typeSigned && keys != 1:
		return r, errors.New("want one of keyPath, keyPaths, keyData and keyDatas")
	}
	for _, k := range append(r.KeyDatas, r.KeyData) {
		if _, err := base64.StdEncoding.DecodeString(k); err != nil {
			return r, errors.New("keyData: want base64")
		}
	}
	if r.SignedIdentity != nil {
		err = r.SignedIdentity.validate()
	}
	return r, err
}

func (i *identity) validate() error {
	wants := map[string]bool{
		"matchExact": true, "matchRepoDigestOrExact": true, "matchRepository": true,
		"exactReference":  i.DockerReference != "",
		"exactRepository": i.DockerRepository != "", "remapIdentity": i.Prefix != "" && i.SignedPrefix != "",
	}
	whole, known := wants[i.Type]
	switch {
	case !known:
		return fmt.Errorf("signedIdentity: type %q is not known", i.Type)
	case !whole:
		return fmt.Errorf("signedIdentity: what %s compares with is missing", i.Type)
	}
	return nil
}

// Check returns nil if the policy allows an image, *RejectedError if it does not, and what kept it
// from finding out.
func (p *Policy) Check(ctx context.Context, s Subject) error {
	if p == nil {
		return nil
	}
	scope, all := p.find(s)
	for _, r := range all {
		reason, err := r.check(ctx, s)
		if err != nil {
			return err
		}
		if reason != "" {
			return &RejectedError{File: p.file, Scope: scope, Requirement: r.Type, Reason: reason}
		}
	}
	return nil
}

// Anything says whether an image is allowed whatever it is: only its name counts.
func (p *Policy) Anything(s Subject) bool {
	if p == nil {
		return true
	}
	_, all := p.find(s)
	return !slices.ContainsFunc(all, func(r requirement) bool { return r.Type != typeAny })
}

// find returns what decides about an image: the narrowest scope that it is in.
func (p *Policy) find(s Subject) (scope string, all []requirement) {
	scopes, ok := p.transports[s.Transport]
	if !ok {
		return "default", p.standard
	}
	for _, scope := range s.scopes() {
		if all, ok := scopes[scope]; ok {
			return strings.TrimSpace(s.Transport + " " + scope), all
		}
	}
	return "default", p.standard
}

// scopes are those that an image is in, the narrowest first.
func (s Subject) scopes() (all []string) {
	if s.Transport == "docker" {
		if s.Tag != "" {
			all = append(all, s.Repository+":"+s.Tag)
		}
		if s.Digest != "" {
			all = append(all, s.Repository+"@"+s.Digest)
		}
	}
	for at := s.Repository; at != "" && at != "." && at != "/"; at = path.Dir(at) {
		all = append(all, at)
	}
	if s.Transport == "docker" {
		host, _, _ := strings.Cut(s.Repository, "/")
		for _, rest, more := strings.Cut(host, "."); more; _, rest, more = strings.Cut(rest, ".") {
			all = append(all, "*."+rest)
		}
	} else if strings.HasPrefix(s.Repository, "/") {
		all = append(all, "/")
	}
	return append(all, "")
}

// check returns why an image is not allowed, or "".
func (r requirement) check(ctx context.Context, s Subject) (reason string, err error) {
	switch {
	case r.unsupported != "":
		return r.unsupported, nil
	case r.Type == "reject":
		return "it is rejected", nil
	case r.Type == typeAny:
		return "", nil
	case s.Signatures == nil:
		return "it must be signed, and what is not of a registry has no signatures", nil
	}
	keys, err := r.keys()
	if err != nil {
		return "", err
	}
	var wrong []string
	for _, manifest := range s.Manifests {
		signatures, err := s.Signatures(ctx, manifest)
		if err != nil {
			return "", fmt.Errorf("look for signatures of %s: %w", s.Repository, err)
		}
		for _, signature := range signatures {
			err := r.verify(keys, signature, s, manifest)
			if err == nil {
				return "", nil
			}
			if why := err.Error(); !slices.Contains(wrong, why) {
				wrong = append(wrong, why)
			}
		}
	}
	if len(wrong) == 0 {
		return "it must be signed, and has no signature", nil
	}
	return "none of its signatures counts: " + strings.Join(wrong[:min(len(wrong), 3)], "; "), nil
}
