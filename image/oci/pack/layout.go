package pack

import (
	"errors"
	"os"
	"path/filepath"
)

// Layout makes an OCI layout of the image at dir, whose layers are links to their files.
func (i *Image) Layout(dir string) error {
	index, _, err := i.indexes(nil)
	if err != nil {
		return err
	}
	at := func(digest string) string { return filepath.Join(dir, blob(digest)) }
	err = errors.Join(os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o700),
		os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o600),
		os.WriteFile(filepath.Join(dir, "index.json"), index, 0o600))
	for digest, text := range map[string][]byte{i.Digest: i.Manifest, i.config.Digest: i.Config} {
		err = errors.Join(err, os.WriteFile(at(digest), text, 0o600))
	}
	for _, l := range i.Layers {
		if _, there := os.Lstat(at(l.Digest)); there != nil { // an image may have a layer twice
			err = errors.Join(err, os.Link(l.Path, at(l.Digest)))
		}
	}
	return err
}
