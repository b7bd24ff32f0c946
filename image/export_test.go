package image

import (
	"context"
	"errors"
)

// SetHost has s look for this machine's kernel, of a release, below a directory.
func (s *Store) SetHost(root, release string) { s.hostRoot, s.hostRelease = root, release }

// HostKernelFile is where s finds this machine's kernel.
func (s *Store) HostKernelFile() (string, error) {
	h, err := s.hostKernel()
	return h.kernel, err
}

// Rename gives i its name, in place of what had it.
func (s *Store) Rename(ctx context.Context, i *Image) error {
	release, err := s.Hold(ctx)
	if err != nil {
		return err
	}
	return errors.Join(s.name(ctx, i), release())
}
