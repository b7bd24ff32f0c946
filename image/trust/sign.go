package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

// keys are those of a requirement. One file may have several.
func (r requirement) keys() (all []crypto.PublicKey, err error) {
	var texts [][]byte
	for _, file := range append(r.KeyPaths, r.KeyPath) {
		if file == "" {
			continue
		}
		text, err := readFile(file, maxKey)
		if err != nil {
			return nil, fmt.Errorf("read key of the policy of images: %w", err)
		}
		texts = append(texts, text)
	}
	for _, k := range append(r.KeyDatas, r.KeyData) {
		text, err := base64.StdEncoding.DecodeString(k)
		if err != nil {
			return nil, err
		}
		texts = append(texts, text)
	}
	for _, text := range texts {
		for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
			key, err := x509.ParsePKIXPublicKey(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("read key of the policy of images: %w", err)
			}
			all = append(all, key)
		}
	}
	if len(all) == 0 {
		return nil, errors.New("read key of the policy of images: there is no PEM in it")
	}
	return all, nil
}

// payload is what is signed: cosign's, and that of the containers project.
type payload struct {
	Critical struct {
		Type  string `json:"type"`
		Image struct {
			Digest string `json:"docker-manifest-digest"`
		} `json:"image"`
		Identity struct {
			Reference string `json:"docker-reference"`
		} `json:"identity"`
	} `json:"critical"`
}

const payloadType = "cosign container image signature"

// verify returns why a signature is not one of an image by one of some keys. Nothing of the payload
// is read that nobody has signed.
func (r requirement) verify(keys []crypto.PublicKey, s Signature, of Subject, manifest string) error {
	signed, err := base64.StdEncoding.DecodeString(s.Base64)
	if err != nil {
		return errors.New("one is no base64")
	}
	if !signedByOne(keys, s.Payload, signed) {
		return errors.New("one is of another key")
	}
	var p payload
	if err := json.Unmarshal(s.Payload, &p); err != nil || p.Critical.Type != payloadType {
		return errors.New("what one signs is not an image")
	}
	if p.Critical.Image.Digest != manifest {
		return fmt.Errorf("one is about %.80s", p.Critical.Image.Digest)
	}
	if !r.SignedIdentity.matches(p.Critical.Identity.Reference, of) {
		return fmt.Errorf("one is about %.200q", p.Critical.Identity.Reference)
	}
	return nil
}

func signedByOne(keys []crypto.PublicKey, data, signature []byte) bool {
	sum := sha256.Sum256(data)
	for _, key := range keys {
		ok := false
		switch key := key.(type) {
		case *ecdsa.PublicKey:
			ok = ecdsa.VerifyASN1(key, sum[:], signature)
		case *rsa.PublicKey:
			ok = rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], signature) == nil
		case ed25519.PublicKey:
			ok = ed25519.Verify(key, data, signature)
		}
		if ok {
			return true
		}
	}
	return false
}

// matches says whether a signature's reference is the image's. Nil is what the format has where
// nothing is said: the repository and the tag, or the repository of an image that was asked for by
// its digest. cosign signs repositories: its signatures need matchRepository.
func (i *identity) matches(signed string, of Subject) bool {
	kind := "matchRepoDigestOrExact"
	if i != nil {
		kind = i.Type
	}
	repository, tag := split(signed)
	wanted := of.Repository
	exact := func() bool { return repository == wanted && tag != "" && tag == of.Tag }
	switch kind {
	case "matchExact":
		return exact()
	case "matchRepository":
		return repository == wanted
	case "exactReference":
		return signed == i.DockerReference
	case "exactRepository":
		return repository == i.DockerRepository
	case "remapIdentity":
		if rest, ok := strings.CutPrefix(wanted, i.Prefix); ok && (rest == "" || rest[0] == '/') {
			wanted = i.SignedPrefix + rest
		}
	}
	if of.Digest != "" {
		return repository == wanted
	}
	return exact()
}

// split parts a reference into the repository and a tag, which may be empty.
func split(reference string) (repository, tag string) {
	reference, _, _ = strings.Cut(reference, "@")
	if at := strings.LastIndexByte(reference, ':'); at > strings.LastIndexByte(reference, '/') {
		return reference[:at], reference[at+1:]
	}
	return reference, ""
}
