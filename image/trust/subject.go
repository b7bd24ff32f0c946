package trust

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"push.rocks/smartvm/image/oci/manifest"
)

// OfRegistry is the image that a reference names. Its manifests and signatures are filled in when
// they are known.
func OfRegistry(ref name.Reference) Subject {
	s := Subject{
		Transport:  "docker",
		Repository: strings.Replace(ref.Context().Name(), name.DefaultRegistry+"/", "docker.io/", 1),
	}
	if _, pinned := ref.(name.Digest); pinned {
		s.Digest = ref.Identifier()
	} else {
		s.Tag = ref.Identifier()
	}
	return s
}

// OfFile is an image in a file or directory, of which scopes have the path without symbolic links.
// An empty path is that of a stream.
func OfFile(transport, path string) (Subject, error) {
	s := Subject{Transport: transport}
	if path == "" {
		return s, nil
	}
	whole, err := filepath.EvalSymlinks(path)
	if err == nil {
		s.Repository, err = filepath.Abs(whole)
	}
	return s, err
}

// Bounds of what a registry may send.
const (
	maxSignatures = 64 // the newest
	maxPayload    = 64 << 10
)

// signatureKey is the annotation of a layer, the payload, that has the signature.
const signatureKey = "dev.cosignproject.cosign/signature"

// Stored reads the signatures of a manifest as cosign stores them: an image in the same repository,
// tagged by the manifest's digest, each layer a payload.
// https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md
//
// Get reads a part of the repository, "manifests/TAG" or "blobs/DIGEST"; nil if it is not there.
func Stored(ctx context.Context, digest string, get func(ctx context.Context, part string) ([]byte, error)) (
	[]Signature, error,
) {
	tag := strings.Replace(digest, ":", "-", 1) + ".sig"
	text, err := get(ctx, "manifests/"+tag)
	if err != nil || text == nil {
		return nil, err
	}
	d, err := manifest.Read(text, "")
	if err != nil {
		return nil, fmt.Errorf("signatures %s: %w", tag, err)
	}
	var all []Signature
	for _, l := range d.Layers[max(len(d.Layers)-maxSignatures, 0):] {
		signature := l.Annotations[signatureKey]
		if signature == "" || l.Size > maxPayload || manifest.ValidDigest(l.Digest) != nil {
			continue
		}
		payload, err := get(ctx, "blobs/"+l.Digest)
		if err != nil {
			return nil, fmt.Errorf("signatures %s: %w", tag, err)
		}
		if len(payload) <= maxPayload && manifest.Digest(payload) == l.Digest {
			all = append(all, Signature{Payload: payload, Base64: signature})
		}
	}
	return all, nil
}
