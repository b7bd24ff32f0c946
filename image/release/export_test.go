package release

// FindDigest is for the fuzzer.
var FindDigest = findDigest

// SetUnpackLimit spares tests gigabytes.
func (s *Store) SetUnpackLimit(bytes int64) { s.unpack = bytes }
