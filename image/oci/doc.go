// Package oci turns container images into root file systems: Resolve finds an image in a registry,
// an OCI layout or an archive, and Flatten makes one read-only ext4 image of its layers, which it
// fetches meanwhile.
//
// All that is fetched is foreign. Layers are checked against their digests, packed and unpacked;
// package flatten says what they may hold.
package oci

import (
	"errors"
	"fmt"
	"net"
	"net/url"
)

const (
	maxLayers   = 512
	maxManifest = 4 << 20 // bytes of a manifest, an index or a configuration
)

// ErrNotFound says that there is no such image where the reference leads.
var ErrNotFound = errors.New("no such image")

// ErrUnchanged says that a tag leads to what Options.Unless names.
var ErrUnchanged = errors.New("the image has not changed")

// ErrPlainHTTP refuses to speak to another machine without TLS.
var ErrPlainHTTP = errors.New("plain HTTP is for this machine alone")

// UnreachableError says that a registry cannot be spoken to.
type UnreachableError struct {
	Host string
	Err  error
}

func (e *UnreachableError) Error() string {
	why := e.Err
	var lookup *net.DNSError
	var network *net.OpError
	var request *url.Error
	switch {
	case errors.As(e.Err, &lookup):
		why = errors.New("its name cannot be looked up: " + lookup.Err)
	case errors.As(e.Err, &network):
		why = network.Err
	case errors.As(e.Err, &request):
		why = request.Err
	}
	return fmt.Sprintf("registry %s cannot be reached: %v", e.Host, why)
}

func (e *UnreachableError) Unwrap() error { return e.Err }
