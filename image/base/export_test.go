package base

import (
	"net/url"
	"strings"

	"push.rocks/smartvm/internal/download"
)

// WithClient has a store fetch by a client.
func WithClient(o Options, c *download.Client) Options {
	o.client = c
	return o
}

// Natural is how names are ordered.
var Natural = natural

// ParseListing reads a page of a bucket's listing: keys, prefixes and how to ask for the next one.
func ParseListing(data []byte) (keys, prefixes []string, next string, err error) {
	l, next, err := parseListing(data)
	for _, o := range l.objects {
		keys = append(keys, o.key)
	}
	return keys, l.prefixes, next, err
}

// Choose returns the names of the kernel and the root file system that are taken of some keys.
func Choose(keys []string, prefix string) (kernel, rootfs string) {
	var objects []object
	for _, k := range keys {
		objects = append(objects, object{key: k})
	}
	k, r := choose(objects, prefix)
	if k != nil {
		kernel = strings.TrimPrefix(k.key, prefix)
	}
	if r != nil {
		rootfs = strings.TrimPrefix(r.key, prefix)
	}
	return kernel, rootfs
}

// ParseManifest returns the names of the files that a manifest gives a bundle, and where they come
// from.
func ParseManifest(data []byte, from *url.URL) (id string, names, sources, digests []string, err error) {
	o := &origin{path: "/dir/manifest.json", url: from, arch: "x86_64"}
	p, err := parseManifest(data, o)
	if err != nil {
		return "", nil, nil, nil, err
	}
	for _, a := range []artifact{p.kernel, p.rootfs} {
		names, sources, digests = append(names, a.fileName), append(sources, a.source()), append(digests, a.sha256)
	}
	return p.id, names, sources, digests, nil
}
