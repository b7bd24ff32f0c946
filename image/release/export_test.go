package release

import "push.rocks/smartvm/internal/download"

// WithClient has a store fetch by a client.
func WithClient(o Options, c *download.Client) Options {
	o.client = c
	return o
}

// FindDigest is for the fuzzer.
var FindDigest = findDigest

// SetUnpackLimit spares tests gigabytes.
func (s *Store) SetUnpackLimit(bytes int64) { s.unpack = bytes }
