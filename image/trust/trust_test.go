package trust_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/image/trust"
)

var (
	manifest = "sha256:" + strings.Repeat("1", 64)
	index    = "sha256:" + strings.Repeat("2", 64)
	another  = "sha256:" + strings.Repeat("3", 64)
)

// key signs as cosign does.
type key struct {
	crypto.Signer
	pem []byte
}

func newKey(t *testing.T, signer crypto.Signer, err error) key {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key{signer, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})}
}

func ecdsaKey(t *testing.T) key {
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return newKey(t, signer, err)
}

func (k key) data() string { return base64.StdEncoding.EncodeToString(k.pem) }

func (k key) sign(t *testing.T, kind, reference, digest string) trust.Signature {
	t.Helper()
	payload := fmt.Appendf(nil,
		`{"critical":{"identity":{"docker-reference":%q},"image":{"docker-manifest-digest":%q},"type":%q},"optional":null}`,
		reference, digest, kind)
	sum, options := sha256.Sum256(payload), crypto.SignerOpts(crypto.SHA256)
	signed := sum[:]
	if _, ok := k.Signer.(ed25519.PrivateKey); ok {
		signed, options = payload, crypto.Hash(0)
	}
	signature, err := k.Sign(rand.Reader, signed, options)
	if err != nil {
		t.Fatal(err)
	}
	return trust.Signature{Payload: payload, Base64: base64.StdEncoding.EncodeToString(signature)}
}

const image = "cosign container image signature"

func parse(t *testing.T, text string) *trust.Policy {
	t.Helper()
	p, err := trust.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The narrowest scope decides.
func TestCheck_Scopes(t *testing.T) {
	p := parse(t, `{"default": [{"type": "reject"}], "transports": {
		"docker": {
			"docker.io/library/debian": [{"type": "insecureAcceptAnything"}],
			"docker.io/library/debian:old": [{"type": "reject"}],
			"docker.io/library/debian@`+another+`": [{"type": "reject"}],
			"registry.test:5000/team": [{"type": "insecureAcceptAnything"}],
			"registry.test:5000/team/bad": [{"type": "reject"}],
			"*.example.test": [{"type": "insecureAcceptAnything"}]},
		"oci": {"": [{"type": "insecureAcceptAnything"}], "/srv/bad": [{"type": "reject"}]}}}`)
	for _, c := range []struct {
		subject trust.Subject
		scope   string // that rejects it; empty: it is allowed
	}{
		{trust.Subject{Transport: "docker", Repository: "docker.io/library/debian", Tag: "12"}, ""},
		{
			trust.Subject{Transport: "docker", Repository: "docker.io/library/debian", Tag: "old"},
			"docker docker.io/library/debian:old",
		},
		{trust.Subject{Transport: "docker", Repository: "docker.io/library/debian", Digest: manifest}, ""},
		{
			trust.Subject{Transport: "docker", Repository: "docker.io/library/debian", Digest: another},
			"docker docker.io/library/debian@" + another,
		},
		{trust.Subject{Transport: "docker", Repository: "docker.io/library/debianx", Tag: "12"}, "default"},
		{trust.Subject{Transport: "docker", Repository: "registry.test:5000/team/a/b", Tag: "1"}, ""},
		{
			trust.Subject{Transport: "docker", Repository: "registry.test:5000/team/bad/b", Tag: "1"},
			"docker registry.test:5000/team/bad",
		},
		{trust.Subject{Transport: "docker", Repository: "registry.test:5000/other", Tag: "1"}, "default"},
		{trust.Subject{Transport: "docker", Repository: "a.b.example.test/x", Tag: "1"}, ""},
		{trust.Subject{Transport: "docker", Repository: "example.test/x", Tag: "1"}, "default"},
		{trust.Subject{Transport: "oci", Repository: "/srv/good"}, ""},
		{trust.Subject{Transport: "oci", Repository: "/srv/bad/layout"}, "oci /srv/bad"},
		{trust.Subject{Transport: "docker-archive", Repository: "/srv/a.tar"}, "default"},
	} {
		err := p.Check(t.Context(), c.subject)
		rejected, _ := errors.AsType[*trust.RejectedError](err)
		switch {
		case c.scope == "" && err != nil, c.scope != "" && rejected == nil:
			t.Errorf("%+v: got %v", c.subject, err)
		case rejected != nil && rejected.Scope != c.scope:
			t.Errorf("%+v: rejected by %q, want %q", c.subject, rejected.Scope, c.scope)
		}
	}
}

// What has a signature by one of the keys, about this image, is allowed, and nothing else.
func TestCheck_Signed(t *testing.T) {
	ours, other := ecdsaKey(t), ecdsaKey(t)
	rsaSigner, err := rsa.GenerateKey(rand.Reader, 2048)
	rsaKey := newKey(t, rsaSigner, err)
	_, edSigner, err := ed25519.GenerateKey(rand.Reader)
	edKey := newKey(t, edSigner, err)
	file := filepath.Join(t.TempDir(), "keys.pem")
	if err := os.WriteFile(file, append(rsaKey.pem, edKey.pem...), 0o600); err != nil {
		t.Fatal(err)
	}
	const repository, tagged = "registry.test/team/app", "registry.test/team/app:1"
	byData := func(more string) string {
		return fmt.Sprintf(`{"default": [{"type": "sigstoreSigned", "keyData": %q%s}]}`, ours.data(), more)
	}
	as := func(kind, more string) string {
		return byData(fmt.Sprintf(`, "signedIdentity": {"type": %q%s}`, kind, more))
	}
	forged := ours.sign(t, image, tagged, another)
	forged.Payload = ours.sign(t, image, tagged, manifest).Payload
	for name, c := range map[string]struct {
		policy     string
		signatures map[string][]trust.Signature // by manifest
		digest     string                       // asked for, in place of the tag
		why        string                       // it is rejected; empty: it is not
	}{
		"exact": {
			policy:     byData(""),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, tagged, manifest)}},
		},
		"of the index": {
			policy:     byData(""),
			signatures: map[string][]trust.Signature{index: {ours.sign(t, image, tagged, index)}},
		},
		"second of two": {
			policy: byData(""),
			signatures: map[string][]trust.Signature{
				manifest: {other.sign(t, image, tagged, manifest), ours.sign(t, image, tagged, manifest)},
			},
		},
		"none": {policy: byData(""), why: "has no signature"},
		"other key": {
			policy:     byData(""),
			signatures: map[string][]trust.Signature{manifest: {other.sign(t, image, tagged, manifest)}}, why: "of another key",
		},
		"other image": {
			policy:     byData(""),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, tagged, another)}}, why: "about " + another,
		},
		"other payload": {
			policy: byData(""), signatures: map[string][]trust.Signature{manifest: {forged}},
			why: "of another key",
		},
		"other kind": {
			policy:     byData(""),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, "an attestation", tagged, manifest)}},
			why:        "is not an image",
		},
		"other tag": {
			policy:     byData(""),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, repository+":2", manifest)}},
			why:        `about "registry.test/team/app:2"`,
		},
		"no tag": {
			policy:     byData(""),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, repository, manifest)}},
			why:        `about "registry.test/team/app"`,
		},
		"cosign's": {
			policy:     as("matchRepository", ""),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, repository, manifest)}},
		},
		"other repository": {
			policy:     as("matchRepository", ""),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, repository+"x", manifest)}}, why: "about",
		},
		"asked by digest": {
			policy: byData(""), digest: manifest,
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, repository, manifest)}},
		},
		"exact, by digest": {
			policy: as("matchExact", ""), digest: manifest,
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, tagged, manifest)}}, why: "about",
		},
		"exact reference": {
			policy:     as("exactReference", `, "dockerReference": "vendor.test/app:9"`),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, "vendor.test/app:9", manifest)}},
		},
		"exact repository": {
			policy:     as("exactRepository", `, "dockerRepository": "vendor.test/app"`),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, "vendor.test/app:9", manifest)}},
		},
		"mirror": {
			policy:     as("remapIdentity", `, "prefix": "registry.test/team", "signedPrefix": "vendor.test"`),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, "vendor.test/app:1", manifest)}},
		},
		"half a prefix": {
			policy:     as("remapIdentity", `, "prefix": "registry.test/te", "signedPrefix": "vendor.test"`),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, "vendor.testam/app:1", manifest)}},
			why:        "about",
		},
		"RSA of a file": {
			policy:     fmt.Sprintf(`{"default": [{"type": "sigstoreSigned", "keyPath": %q}]}`, file),
			signatures: map[string][]trust.Signature{manifest: {rsaKey.sign(t, image, tagged, manifest)}},
		},
		"Ed25519 of a file": {
			policy:     fmt.Sprintf(`{"default": [{"type": "sigstoreSigned", "keyPaths": [%q]}]}`, file),
			signatures: map[string][]trust.Signature{manifest: {edKey.sign(t, image, tagged, manifest)}},
		},
		"two requirements": {
			policy: fmt.Sprintf(
				`{"default": [{"type": "sigstoreSigned", "keyData": %q}, {"type": "sigstoreSigned", "keyData": %q}]}`, ours.data(),
				other.data()), signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, tagged, manifest)}},
			why: "of another key",
		},
		"both": {
			policy: fmt.Sprintf(
				`{"default": [{"type": "sigstoreSigned", "keyData": %q}, {"type": "sigstoreSigned", "keyData": %q}]}`, ours.data(),
				other.data()),
			signatures: map[string][]trust.Signature{
				manifest: {ours.sign(t, image, tagged, manifest), other.sign(t, image, tagged, manifest)},
			},
		},
		"GPG": {
			policy: `{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k"}]}`,
			why:    "signedBy (GPG) is not supported",
		},
		"a log": {
			policy:     byData(`, "rekorPublicKeyPath": "/k"`),
			signatures: map[string][]trust.Signature{manifest: {ours.sign(t, image, tagged, manifest)}},
			why:        "rekorPublicKeyPath is not supported",
		},
		"not of a registry": {
			policy: byData(""), signatures: map[string][]trust.Signature{"none": nil},
			why: "what is not of a registry",
		},
		"nothing but reject": {
			policy: `{"default": [{"type": "insecureAcceptAnything"}, {"type": "reject"}]}`,
			why:    "it is rejected",
		},
	} {
		s := trust.Subject{Transport: "docker", Repository: repository, Tag: "1", Manifests: []string{manifest, index}}
		if c.digest != "" {
			s.Tag, s.Digest = "", c.digest
		}
		if _, none := c.signatures["none"]; !none {
			s.Signatures = func(_ context.Context, of string) ([]trust.Signature, error) { return c.signatures[of], nil }
		}
		err := parse(t, c.policy).Check(t.Context(), s)
		rejected, _ := errors.AsType[*trust.RejectedError](err)
		if c.why == "" && err != nil || c.why != "" && (rejected == nil || !strings.Contains(rejected.Reason, c.why)) {
			t.Errorf("%s: got %v, want %q", name, err, c.why)
		}
	}
}

// What cannot be found out is no verdict.
func TestCheck_Unknown(t *testing.T) {
	k := ecdsaKey(t)
	s := trust.Subject{Transport: "docker", Repository: "registry.test/app", Tag: "1", Manifests: []string{manifest}}
	down := errors.New("registry is down")
	s.Signatures = func(context.Context, string) ([]trust.Signature, error) { return nil, down }
	signed := fmt.Sprintf(`{"default": [{"type": "sigstoreSigned", "keyData": %q}]}`, k.data())
	if err := parse(t, signed).Check(t.Context(), s); !errors.Is(err, down) {
		t.Errorf("got %v", err)
	}
	missing := `{"default": [{"type": "sigstoreSigned", "keyPath": "/nonexistent/key.pem"}]}`
	if err := parse(t, missing).Check(t.Context(), s); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no key: got %v", err)
	}
	empty := fmt.Sprintf(`{"default": [{"type": "sigstoreSigned", "keyData": %q}]}`,
		base64.StdEncoding.EncodeToString([]byte("no key")))
	if err := parse(t, empty).Check(t.Context(), s); err == nil || !strings.Contains(err.Error(), "no PEM") {
		t.Errorf("no PEM: got %v", err)
	}
}

func TestParse_Wrong(t *testing.T) {
	for text, want := range map[string][]string{
		`{}`:             {"default: want at least one requirement"},
		`{"default":[]}`: {"default: want at least one requirement"},
		`{"default":[{"type":"acceptAnything"}]}`:                                                          {`default[0]: type "acceptAnything"`},
		`{"default":[{"type":"reject"}],"transport":{}}`:                                                   {"transport"},
		`{"default":[{"type":"reject","more":1}]}`:                                                         {"more"},
		`{"default":[{"type":"reject","keyPath":"/k"}]}`:                                                   {"reject takes neither keys"},
		`{"default":[{"type":"sigstoreSigned"}]}`:                                                          {"want one of keyPath"},
		`{"default":[{"type":"sigstoreSigned","keyPath":"/k","keyData":"a2V5"}]}`:                          {"want one of keyPath"},
		`{"default":[{"type":"sigstoreSigned","keyData":"!"}]}`:                                            {"want base64"},
		`{"default":[{"type":"sigstoreSigned","keyPath":"/k","signedIdentity":{"type":"any"}}]}`:           {`type "any" is not known`},
		`{"default":[{"type":"sigstoreSigned","keyPath":"/k","signedIdentity":{"type":"remapIdentity"}}]}`: {"is missing"},
		`{"default":[],"transports":{"docker":{"a":[]}}}`: {
			"default:",
			`transports.docker["a"]: want at least one`,
		},
		`{"default":["reject"]}`: {"want an object"},
	} {
		_, err := trust.Parse([]byte(text))
		for _, w := range want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: got %v, want %q", text, err, w)
			}
		}
	}
	if _, err := trust.Load("/nonexistent/policy.json"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// A user's own policy comes before the machine's.
func TestDefault(t *testing.T) {
	home := t.TempDir()
	lookup := func(name string) (string, bool) { return home, name == "HOME" }
	before, err := trust.Default(lookup)()
	if err != nil {
		t.Skipf("this machine's policy is broken: %v", err)
	}
	file := filepath.Join(home, ".config", "containers", "policy.json")
	write := func(text string) {
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	s := trust.Subject{Transport: "docker", Repository: "registry.test/app", Tag: "1"}
	if _, err := os.Stat("/etc/containers/policy.json"); errors.Is(err, os.ErrNotExist) &&
		(before != nil || before.Check(t.Context(), s) != nil || !before.Anything(s)) {
		t.Errorf("without any: %+v", before)
	}
	write(`{"default": [{"type": "insecureAcceptAnything"}, {"type": "reject"}]}`)
	p, err := trust.Default(lookup)()
	if err != nil {
		t.Fatal(err)
	}
	if rejected, ok := errors.AsType[*trust.RejectedError](p.Check(t.Context(), s)); !ok || rejected.File != file ||
		rejected.Requirement != "reject" || p.Anything(s) {
		t.Errorf("got %+v", rejected)
	}
	write("{")
	if _, err := trust.Default(lookup)(); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a broken one: %v", err)
	}
}

// What a registry gives as signatures is bounded, and is what it says.
func TestStored(t *testing.T) {
	digest := func(text string) string {
		sum := sha256.Sum256([]byte(text))
		return fmt.Sprintf("sha256:%x", sum)
	}
	blobs := map[string]string{}
	var layers []string
	layer := func(payload, is string, size int) {
		blobs["blobs/"+digest(payload)] = is
		layers = append(layers,
			fmt.Sprintf(`{"digest": %q, "size": %d, "annotations": {"dev.cosignproject.cosign/signature": %q}}`, digest(payload),
				size, "of "+payload))
	}
	layer("the oldest", "the oldest", 10)
	for n := range 60 {
		layer(fmt.Sprint(n), fmt.Sprint(n), 2)
	}
	layer("wrong", "rubbish", 5)
	layer("large", "large", 1<<20)
	layer(strings.Repeat("x", 65<<10), strings.Repeat("x", 65<<10), 1)
	layer("last", "last", 4)
	layers = append(layers, fmt.Sprintf(`{"digest": %q, "size": 4}`, digest("last")))
	blobs["manifests/"+strings.Replace(manifest, ":", "-", 1)+".sig"] = fmt.Sprintf(
		`{"schemaVersion": 2, "config": {}, "layers": [%s]}`, strings.Join(layers, ","))
	get := func(_ context.Context, part string) ([]byte, error) {
		if text, ok := blobs[part]; ok {
			return []byte(text), nil
		}
		return nil, nil
	}
	all, err := trust.Stored(t.Context(), manifest, get)
	if err != nil || len(all) != 60 || string(all[0].Payload) != "1" || all[0].Base64 != "of 1" ||
		string(all[59].Payload) != "last" {
		t.Errorf("%d: %+v, %v", len(all), all, err)
	}
	if all, err := trust.Stored(t.Context(), another, get); err != nil || len(all) != 0 {
		t.Errorf("of one that has none: %+v, %v", all, err)
	}
	down := errors.New("registry is down")
	if _, err := trust.Stored(t.Context(), manifest, func(context.Context, string) ([]byte, error) {
		return nil, down
	}); !errors.Is(err, down) {
		t.Errorf("got %v", err)
	}
}

// What a registry stores as signatures is anybody's.
func FuzzStored(f *testing.F) {
	f.Add([]byte(`{"layers": [{"digest": "` + manifest +
		`", "size": 3, "annotations": {"dev.cosignproject.cosign/signature": "c2ln"}}]}`))
	f.Add([]byte(`{"manifests": []}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		asked := 0
		all, err := trust.Stored(t.Context(), manifest, func(_ context.Context, part string) ([]byte, error) {
			if asked++; asked > 65 || strings.Contains(part, "..") {
				t.Errorf("request %d is for %q", asked, part)
			}
			if strings.HasPrefix(part, "manifests/") {
				return data, nil
			}
			return []byte("sig"), nil
		})
		if err != nil && len(all) > 0 {
			t.Errorf("%+v and %v", all, err)
		}
	})
}
