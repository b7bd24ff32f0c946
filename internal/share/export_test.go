package share

import (
	"context"
	"io"
)

// Archive writes the archive that an image's file system is made of, and tells what is left out.
func (i *Image) Archive(ctx context.Context, w io.Writer) error {
	c, err := i.open(ctx)
	defer c.close()
	if err == nil {
		err = c.write(w)
	}
	if err == nil {
		i.warn(c)
	}
	return err
}
