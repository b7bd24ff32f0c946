package image_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/oci/ocitest"
	"push.rocks/smartvm/image/trust"
)

// signer signs as cosign does.
type signer struct{ *ecdsa.PrivateKey }

func newSigner(t *testing.T) signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signer{k}
}

// policy allows what the signer has signed.
func (s signer) policy(t *testing.T) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(s.Public())
	if err != nil {
		t.Fatal(err)
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	return fmt.Sprintf(`{"default": [{"type": "reject"}], "transports": {"docker": {"": [{"type": "sigstoreSigned", "keyData": %q,
		"signedIdentity": {"type": "matchRepository"}}]}}}`, base64.StdEncoding.EncodeToString(key))
}

// sign stores a signature beside an image: at is the digest that it is stored for, and of what it
// says.
func (s signer) sign(t *testing.T, repository string, at, of v1.Hash, reference string) {
	t.Helper()
	payload := fmt.Appendf(nil,
		`{"critical":{"identity":{"docker-reference":%q},"image":{"docker-manifest-digest":%q},"type":"cosign container image signature"},"optional":null}`, reference, of)
	sum := sha256.Sum256(payload)
	signature, err := s.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(repository + ":" + strings.Replace(at.String(), ":", "-", 1) + ".sig")
	if err != nil {
		t.Fatal(err)
	}
	have, err := remote.Image(tag)
	if err != nil {
		have = empty.Image
	}
	have, err = mutate.Append(have, mutate.Addendum{
		Layer:       static.NewLayer(payload, "application/vnd.dev.cosign.simplesigning.v1+json"),
		Annotations: map[string]string{"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(signature)},
	})
	if err == nil {
		err = remote.Write(tag, have)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// follow has a store follow a policy.json, and returns its path.
func follow(t *testing.T, text string) (path string, set func(o *image.Options)) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "policy.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path, func(o *image.Options) { o.OCI.Trust = func() (*trust.Policy, error) { return trust.Load(path) } }
}

// pushIndex has an index of one image.
func (r *testRegistry) pushIndex(t *testing.T, ref string, img v1.Image) (index v1.Hash) {
	t.Helper()
	ii := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}})
	tag, err := name.NewTag(r.host + "/" + ref)
	if err == nil {
		err = remote.WriteIndex(tag, ii)
	}
	if err == nil {
		index, err = ii.Digest()
	}
	if err != nil {
		t.Fatal(err)
	}
	return index
}

// What the policy wants signed is pulled when it is, by the right key and as what it is, and else
// nothing of it is kept.
func TestPull_Signed(t *testing.T) {
	ours, other := newSigner(t), newSigner(t)
	for n, c := range []struct {
		name string
		sign func(t *testing.T, repository string, index, manifest v1.Hash)
		why  string // it is rejected; empty: it is not
	}{
		{"nothing", func(*testing.T, string, v1.Hash, v1.Hash) {}, "has no signature"},
		{"index", func(t *testing.T, r string, index, _ v1.Hash) { ours.sign(t, r, index, index, r) }, ""},
		{"manifest", func(t *testing.T, r string, _, manifest v1.Hash) { ours.sign(t, r, manifest, manifest, r) }, ""},
		{"another key", func(t *testing.T, r string, index, _ v1.Hash) {
			other.sign(t, r, index, index, r)
		}, "of another key"},
		{"another key, and ours", func(t *testing.T, r string, index, _ v1.Hash) {
			other.sign(t, r, index, index, r)
			ours.sign(t, r, index, index, r)
		}, ""},
		{"another image", func(t *testing.T, r string, index, _ v1.Hash) {
			ours.sign(t, r, index, v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("0", 64)}, r)
		}, "about sha256:0000"},
		{"the manifest, beside the index", func(t *testing.T, r string, index, manifest v1.Hash) {
			ours.sign(t, r, index, manifest, r)
		}, "about sha256:"},
		{"another repository", func(t *testing.T, r string, index, _ v1.Hash) {
			ours.sign(t, r, index, index, r+"/else")
		}, `/else"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, dir := newRegistry(t), storeDir(t)
			img := randomImage(t, 1)
			repository := fmt.Sprintf("%s/app%d", r.host, n)
			ref := repository + ":1"
			index := r.pushIndex(t, strings.TrimPrefix(ref, r.host+"/"), img)
			manifest, err := img.Digest()
			if err != nil {
				t.Fatal(err)
			}
			c.sign(t, repository, index, manifest)
			file, policy := follow(t, ours.policy(t))
			s := open(t, dir, policy)
			_, err = s.Pull(t.Context(), ref, "")
			if c.why == "" {
				if err != nil {
					t.Fatal(err)
				}
				// Asked again, nothing has changed, and the signature is looked at again.
				if _, err := s.Pull(t.Context(), ref, ""); err != nil {
					t.Error(err)
				}
				wantSound(t, s, dir)
				return
			}
			rejected, ok := errors.AsType[*trust.RejectedError](err)
			if !ok || !strings.Contains(rejected.Reason, c.why) {
				t.Fatalf("got %v, want %q", err, c.why)
			}
			for _, want := range []string{ref, file, "docker", "sigstoreSigned"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not say %q", err, want)
				}
			}
			if advice := hintOf(err); !strings.Contains(advice, file) || !strings.Contains(advice, "cosign sign") {
				t.Errorf("hint %q", advice)
			}
			if all, err := s.List(); err != nil || len(all) > 0 || len(tree(t, filepath.Join(dir, "layers"))) > 0 ||
				len(tree(t, filepath.Join(dir, "objects"))) > 0 {
				t.Errorf("it is here all the same: %v, %v", all, err)
			}
		})
	}
}

// A policy is about pulls: what was pulled before it stays, and is not pulled again.
func TestPull_PolicyChanges(t *testing.T) {
	r, dir := newRegistry(t), storeDir(t)
	ref := r.push(t, "app:1", randomImage(t, 1))
	if _, err := open(t, dir).Pull(t.Context(), ref, ""); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{`{"default": [{"type": "reject"}]}`, newSigner(t).policy(t)} {
		_, policy := follow(t, text)
		s := open(t, dir, policy)
		if _, err := s.Pull(t.Context(), ref, ""); !errors.As(err, new(*trust.RejectedError)) {
			t.Errorf("%s: %v", text, err)
		}
		if _, err := s.Find(ref); err != nil {
			t.Error(err)
		}
		wantSound(t, s, dir)
	}
	_, policy := follow(t, `{"default": [{"type": "insecureAcceptAnything"}]}`)
	if _, err := open(t, dir, policy).Pull(t.Context(), ref, ""); err != nil {
		t.Error(err)
	}
	_, policy = follow(t, `{"default": []}`)
	if _, err := open(t, dir, policy).Pull(t.Context(), ref, ""); err == nil ||
		!strings.Contains(err.Error(), "policy.json") {
		t.Errorf("a policy that says nothing: %v", err)
	}
}

// Files are images as well, by where they are: a link does not lead around a policy.
func TestPull_PolicyOfFiles(t *testing.T) {
	layout := layoutOf(t, map[string][]ocitest.Layer{"1": {files(map[string]string{"a": "a"})}})
	target, err := filepath.EvalSymlinks(layout)
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(layout, link); err != nil {
		t.Fatal(err)
	}
	for text, allowed := range map[string]bool{
		`{"default": [{"type": "reject"}]}`: false,
		fmt.Sprintf(`{"default": [{"type": "insecureAcceptAnything"}], "transports": {"oci": {%q: [{"type": "reject"}]}}}`,
			filepath.Dir(target)): false,
		fmt.Sprintf(`{"default": [{"type": "reject"}], "transports": {"oci": {%q: [{"type": "insecureAcceptAnything"}]}}}`,
			target): true,
		`{"default": [{"type": "reject"}], "transports": {"docker-archive": {"": [{"type": "insecureAcceptAnything"}]}}}`: false,
	} {
		_, policy := follow(t, text)
		s := open(t, storeDir(t), policy)
		for _, ref := range []string{"oci:" + layout, "oci:" + link, "oci:" + layout + ":1"} {
			_, err := s.Pull(t.Context(), ref, "")
			if rejected := errors.As(err, new(*trust.RejectedError)); rejected == allowed || allowed && err != nil {
				t.Errorf("%s by %s: %v", ref, text, err)
			}
		}
	}
	tar, err := exec.CommandContext(t.Context(), "tar", "-C", layout, "-c", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	_, policy := follow(t, `{"default": [{"type": "reject"}]}`)
	stream := func(o *image.Options) { o.OCI.Stdin = bytes.NewReader(tar) }
	if _, err := open(t, storeDir(t), policy, stream).Pull(t.Context(), "-", "app"); !errors.As(err,
		new(*trust.RejectedError)) {
		t.Errorf("a stream: %v", err)
	}
	_, policy = follow(t,
		`{"default": [{"type": "reject"}], "transports": {"docker-archive": {"": [{"type": "insecureAcceptAnything"}]}}}`)
	if _, err := open(t, storeDir(t), policy, stream).Pull(t.Context(), "-", "app"); err != nil {
		t.Errorf("a stream that is allowed: %v", err)
	}
}

// hubOr leads to a registry of the test what is asked of Docker Hub alone.
type hubOr string

func (host hubOr) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Host == name.DefaultRegistry {
		return toDockerHub(host).RoundTrip(r)
	}
	return http.DefaultTransport.RoundTrip(r)
}

// A mirror that has no signatures is asked for the rest all the same.
func TestPull_SignedElsewhere(t *testing.T) {
	ours := newSigner(t)
	mirror, hub := newRegistry(t), newRegistry(t)
	img := randomImage(t, 2)
	mirror.push(t, "team/app:1", img)
	hub.push(t, "team/app:1", img)
	_, policy := follow(t, ours.policy(t))
	s := open(t, storeDir(t), policy, func(o *image.Options) {
		o.OCI.Mirrors, o.OCI.Transport = []string{mirror.host}, hubOr(hub.host)
	})
	if _, err := s.Pull(t.Context(), "team/app:1", ""); !errors.As(err, new(*trust.RejectedError)) {
		t.Errorf("unsigned: %v", err)
	}
	manifest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ours.sign(t, hub.host+"/team/app", manifest, manifest, "docker.io/team/app")
	mirrored, asked := mirror.blobs.Load(), hub.blobs.Load()
	if _, err := s.Pull(t.Context(), "team/app:1", ""); err != nil {
		t.Fatal(err)
	}
	if m, h := mirror.blobs.Load()-mirrored, hub.blobs.Load()-asked; m != 3 || h != 1 {
		t.Errorf("%d blobs of the mirror, and %d of Docker Hub: want the configuration and two layers, and a signature", m, h)
	}
}
