package base

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// kernelDir is where a kernel alone is fetched to, below workDir.
const kernelDir = "kernel"

// Kernel hands the kernel of the newest base image to take, which copies it: for images without
// one, on a machine whose own does not serve. Where the base image is not here it fetches the
// kernel alone, and goes on with what an interrupted call has fetched. Errors are those of Ensure.
func (s *Store) Kernel(ctx context.Context, take func(path, source string) error) error {
	err := s.alone(ctx, func() error {
		if s.opts.Offline {
			b, err := s.last(ctx, Latest)
			if err != nil {
				return err
			}
			return take(b.KernelPath, b.Kernel.Source)
		}
		p, err := s.resolve(ctx, Latest)
		if err != nil {
			return err
		}
		if b, err := s.cached(ctx, p); err == nil {
			return take(b.KernelPath, b.Kernel.Source)
		}
		work := s.path(workDir, kernelDir)
		if err := os.MkdirAll(work, 0o700); err != nil {
			return err
		}
		f, err := s.bring(ctx, "kernel", p.kernel, work)
		if err != nil {
			return err
		}
		return errors.Join(take(filepath.Join(work, f.FileName), f.Source), os.RemoveAll(work))
	})
	if err != nil {
		return fmt.Errorf("fetch a kernel: %w", err)
	}
	return nil
}
