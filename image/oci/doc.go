// Package oci turns container images into root file systems: Resolve finds an image in a registry, an OCI layout or an
// archive, Fetch brings its layers here, and Flatten makes one read-only ext4 image of them.
//
// All that is fetched is foreign. Layers are checked against their digests, packed and unpacked; package flatten says
// what they may hold.
package oci

import (
	"cmp"
	"errors"
	"fmt"
	"strings"
)

const (
	maxLayers   = 512
	maxManifest = 4 << 20 // bytes of a manifest, an index or a configuration
)

// ErrNotFound says that there is no such image where the reference leads.
var ErrNotFound = errors.New("no such image")

// ErrPlainHTTP refuses to speak to another machine without TLS.
var ErrPlainHTTP = errors.New("plain HTTP is for this machine alone")

// PlatformError says that an image is not for the machine in question.
type PlatformError struct {
	Want string   // "linux/amd64"
	Have []string // in the image's order, with variants: "linux/arm/v7"
}

func (e *PlatformError) Error() string {
	return fmt.Sprintf("no image for %s; there are: %s", e.Want, cmp.Or(strings.Join(e.Have, ", "), "none"))
}
