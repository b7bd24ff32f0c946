package image

import (
	"context"
	"errors"

	"push.rocks/smartvm/internal/hostkernel"
)

// SetHost has s look for this machine's kernel, of a release, below a directory.
func (s *Store) SetHost(root, release string) {
	s.host = hostkernel.Machine{Root: root, Release: release}
}

// HostKernelFile is where s finds this machine's kernel.
func (s *Store) HostKernelFile() (string, error) {
	h, err := s.host.Find()
	return h.Kernel, err
}

// Rename gives i its name, in place of what had it.
func (s *Store) Rename(ctx context.Context, i *Image) error {
	release, err := s.Hold(ctx)
	if err != nil {
		return err
	}
	return errors.Join(s.name(ctx, i), release())
}
