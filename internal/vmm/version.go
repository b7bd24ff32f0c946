package vmm

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"time"

	"push.rocks/smartvm/firecracker"
)

// versionTimeout bounds how long a program may take to say which Firecracker it is.
const versionTimeout = 5 * time.Second

// maxVersionOutput bounds what it may say, in bytes.
const maxVersionOutput = 4 << 10

// Version asks the program at path which Firecracker it is.
func Version(ctx context.Context, path string) (firecracker.Version, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, versionTimeout, fmt.Errorf("no answer within %s", versionTimeout))
	defer cancel()
	var out head
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Env, cmd.Stdout, cmd.WaitDelay = []string{}, &out, time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return firecracker.Version{}, fmt.Errorf("run %s --version: %w", path, err)
	}
	v, err := firecracker.ParseVersionOutput("Firecracker", out.Bytes())
	if err != nil {
		return firecracker.Version{}, fmt.Errorf("run %s --version: %w", path, err)
	}
	return v, nil
}

// head keeps the beginning of what is written to it.
type head struct{ bytes.Buffer }

func (h *head) Write(p []byte) (int, error) {
	if room := maxVersionOutput - h.Len(); room > 0 {
		h.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}
