package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Extracted is a vmlinux made out of a bzImage: a side effect on the host that can be undone.
type Extracted struct {
	Source string `json:"source"`
	Target string `json:"target"` // in a directory of ours, which exists
}

// Apply extracts. It returns an error that is fs.ErrExist if Target is there, else those of
// Extract.
func (e *Extracted) Apply(ctx context.Context) (err error) {
	src, err := os.Open(e.Source)
	if err != nil {
		return fmt.Errorf("extract kernel: %w", err)
	}
	defer src.Close()
	fi, err := src.Stat()
	if err != nil {
		return fmt.Errorf("extract kernel: %w", err)
	}
	// Readable to all, like the kernels that distributions ship: a VMM in a jail is another user.
	dst, err := os.OpenFile(e.Target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("extract kernel: %w", err)
	}
	_, err = Extract(ctx, dst, src, fi.Size())
	if err = errors.Join(err, dst.Chmod(0o644), dst.Close()); err != nil {
		return fmt.Errorf("extract kernel %s: %w", e.Source, err)
	}
	return nil
}

// Revert removes Target.
func (e *Extracted) Revert(context.Context) error {
	if err := os.Remove(e.Target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove extracted kernel: %w", err)
	}
	return nil
}
