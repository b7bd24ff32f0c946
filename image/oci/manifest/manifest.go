// Package manifest reads the documents that describe container images: indexes and manifests, of
// OCI and of docker. It chooses the image for a platform, and refuses what is no image or could be
// taken for two things.
package manifest

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"mime"
	"slices"
	"strconv"
	"strings"
)

// Descriptor points to a part of an image.
type Descriptor struct {
	MediaType    string            `json:"mediaType,omitempty"`
	ArtifactType string            `json:"artifactType,omitempty"`
	Digest       string            `json:"digest"`
	Size         int64             `json:"size"`
	Platform     *Platform         `json:"platform,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
}

// Document is an index, which has Manifests, or a manifest, which has Config and Layers.
type Document struct {
	Manifests []Descriptor
	Config    Descriptor
	Layers    []Descriptor
	Index     bool   // else it is a manifest
	artifact  string // its type, if it says so
}

// Media types of indexes and manifests.
const (
	TypeIndex          = "application/vnd.oci.image.index.v1+json"
	TypeManifest       = "application/vnd.oci.image.manifest.v1+json"
	TypeDockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	TypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	typeSchema1        = "application/vnd.docker.distribution.manifest.v1+json"
)

// Read reads an index or a manifest. What it is called, by whoever led here and by itself, must
// agree with what it holds: else it could be one thing here and another for a tool that has checked
// it (CVE-2021-41190). mediaType may be empty. Errors are *NotImageError among others.
func Read(text []byte, mediaType string) (d Document, err error) {
	keys, err := topLevel(text)
	if err != nil {
		return Document{}, fmt.Errorf("read manifest: %w", err)
	}
	get := func(key string, to any) {
		if value, ok := keys[key]; ok && err == nil {
			if err = json.Unmarshal(value, to); err != nil {
				err = fmt.Errorf("read manifest: %s: %w", key, err)
			}
		}
	}
	var schema int
	var own string
	get("schemaVersion", &schema)
	get("mediaType", &own)
	get("artifactType", &d.artifact)
	get("manifests", &d.Manifests)
	get("config", &d.Config)
	get("layers", &d.Layers)
	if err != nil {
		return Document{}, err
	}
	if _, ok := keys["fsLayers"]; ok || schema == 1 {
		return Document{}, &NotImageError{Type: typeSchema1}
	}
	_, config := keys["config"]
	_, layers := keys["layers"]
	_, d.Index = keys["manifests"]
	if d.Index && (config || layers) {
		return Document{}, errors.New("read manifest: it is an index and a manifest at once")
	}
	for _, called := range []string{own, mediaType} {
		index, known := isIndex(called)
		if known && index != d.Index {
			return Document{}, fmt.Errorf("read manifest: it is called %s, and holds something else", called)
		}
	}
	return d, nil
}

// isIndex says what a media type stands for, if that is known.
func isIndex(mediaType string) (index, known bool) {
	if m, _, err := mime.ParseMediaType(mediaType); err == nil {
		mediaType = m
	}
	switch mediaType {
	case TypeIndex, TypeDockerIndex:
		return true, true
	case TypeManifest, TypeDockerManifest:
		return false, true
	}
	return false, false
}

// topLevel returns the values of a JSON object. A key that is there twice, in whatever case, is
// refused: tools differ in which of the two they take.
func topLevel(text []byte) (map[string]json.RawMessage, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	if t, err := d.Token(); err != nil {
		return nil, err
	} else if t != json.Delim('{') {
		return nil, errors.New("it is no JSON object")
	}
	all, seen := map[string]json.RawMessage{}, map[string]bool{}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, err
		}
		key, _ := t.(string)
		if folded := strings.ToLower(key); seen[folded] {
			return nil, fmt.Errorf("key %.40q is there twice", key)
		} else {
			seen[folded] = true
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, err
		}
		all[key] = value
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	return all, nil
}

// NotImageError says that what was found is no container image.
type NotImageError struct {
	Type string // media type of what it is instead
}

func (e *NotImageError) Error() string {
	what := map[string]string{
		"application/vnd.cncf.helm.config.v1+json":         "a Helm chart",
		"application/vnd.docker.plugin.v1+json":            "a plugin of docker's",
		"application/vnd.dev.cosign.simplesigning.v1+json": "a signature of cosign's",
		"application/vnd.in-toto+json":                     "an attestation",
		typeSchema1:                                        "a manifest of schema 1, which nobody has written since 2017",
	}[e.Type]
	return fmt.Sprintf("no container image: it is %s (%.200s)", cmp.Or(what, "an artifact"), e.Type)
}

// Image says whether a manifest is an image's: artifacts have a configuration or layers of types of
// their own. Old tools wrote no types, or that of any bytes.
func (d *Document) Image() error {
	const anyBytes = "application/octet-stream"
	images := []string{
		"", anyBytes, "application/vnd.oci.image.config.v1+json",
		"application/vnd.docker.container.image.v1+json",
	}
	if !slices.Contains(images, d.Config.MediaType) {
		return &NotImageError{Type: cmp.Or(d.artifact, d.Config.MediaType)}
	}
	for _, l := range d.Layers {
		known := slices.ContainsFunc([]string{"application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs."},
			func(begin string) bool {
				return strings.HasPrefix(l.MediaType, begin)
			})
		switch {
		case strings.HasSuffix(l.MediaType, "+encrypted"):
			return fmt.Errorf("layer %.100s is encrypted", l.Digest)
		case !known && l.MediaType != "" && l.MediaType != anyBytes:
			return &NotImageError{Type: cmp.Or(d.artifact, l.MediaType)}
		}
	}
	return nil
}

// Platform is what an image was built for.
type Platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant,omitempty"` // of the architecture: "v3"; empty: the least of them
}

func (p Platform) String() string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// Parse reads what String writes.
func Parse(text string) (Platform, error) {
	parts := strings.Split(text, "/")
	if len(parts) < 2 || len(parts) > 3 {
		return Platform{}, fmt.Errorf("platform %.100q: want OS/ARCHITECTURE", text)
	}
	return Platform{parts[0], parts[1], strings.Join(parts[2:], "")}, nil
}

// Linux is the platform of "amd64", "amd64/v3" or "arm64".
func Linux(arch string) Platform {
	arch, variant, _ := strings.Cut(arch, "/")
	return Platform{OS: "linux", Architecture: arch, Variant: variant}
}

// level makes variants of one architecture comparable: a processor runs what is of its level or
// below. It is below 0 if the variant is unknown.
// https://github.com/opencontainers/image-spec/blob/main/image-index.md#platform-variants
func (p Platform) level() int {
	least := map[string]string{"amd64": "v1", "arm64": "v8", "arm": "v7"}[p.Architecture]
	digits, ok := strings.CutPrefix(cmp.Or(p.Variant, least, "v0"), "v")
	major, minor, _ := strings.Cut(digits, ".")
	n, err := strconv.ParseUint(major, 10, 8)
	m, merr := strconv.ParseUint(cmp.Or(minor, "0"), 10, 8)
	if !ok || err != nil || merr != nil {
		return -1
	}
	if p.Architecture == "arm64" && n == 9 {
		return int(8*100 + (m+5)*10 + 1) // Armv9.0 has all of Armv8.5
	}
	return int(n*100 + m*10)
}

// Pick chooses an image of an index, of those that the machine can run the one of the highest
// level. An only one may be of any platform, as far as the index goes.
func Pick(all []Descriptor, want Platform) (best Descriptor, err error) {
	e := &PlatformError{Want: want.String()}
	level := -1
	for _, d := range all {
		if err := ValidDigest(d.Digest); err != nil {
			return Descriptor{}, err
		}
		p := d.Platform
		if p == nil {
			if len(all) == 1 {
				return d, nil
			}
			continue
		}
		if p.OS == want.OS && p.Architecture == want.Architecture {
			if l := p.level(); l <= want.level() && l > level {
				best, level = d, l
			}
		}
		// Attestations are not for any machine.
		if text := p.String(); p.OS != "unknown" && !slices.Contains(e.Have, text) {
			e.Have = append(e.Have, text)
		}
	}
	if level >= 0 {
		return best, nil
	}
	if i := slices.IndexFunc(all, func(d Descriptor) bool { return d.ArtifactType != "" }); i >= 0 && len(e.Have) == 0 {
		return Descriptor{}, &NotImageError{Type: all[i].ArtifactType}
	}
	return Descriptor{}, e
}

// PlatformError says that an image is not for the machine in question.
type PlatformError struct {
	Want string   // "linux/amd64"
	Have []string // in the image's order, with variants: "linux/arm/v7"
}

func (e *PlatformError) Error() string {
	return fmt.Sprintf("no image for %s; there are: %s", e.Want, cmp.Or(strings.Join(e.Have, ", "), "none"))
}

// Algorithm begins a digest. There is no other.
const Algorithm = "sha256:"

// Digest is a text's.
func Digest(text []byte) string {
	sum := sha256.Sum256(text)
	return Algorithm + hex.EncodeToString(sum[:])
}

// DigestOf is that of what a SHA-256 has been given.
func DigestOf(h hash.Hash) string { return Algorithm + hex.EncodeToString(h.Sum(nil)) }

// ValidDigest makes sure that a digest can be part of a file's name.
func ValidDigest(d string) error {
	digits, ok := strings.CutPrefix(d, Algorithm)
	if !ok || len(digits) != 2*sha256.Size || strings.Trim(digits, "0123456789abcdef") != "" {
		return fmt.Errorf("digest %.100q is not a SHA-256", d)
	}
	return nil
}

// Layer is one of an image's, a tar.
type Layer struct {
	Digest string // "sha256:…", of the file as it is fetched
	DiffID string // "sha256:…", of the tar
	Size   int64  // bytes, as it is fetched
}
