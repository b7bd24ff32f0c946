package vmm

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"time"

	"push.rocks/smartvm/firecracker"
)

// versionTimeout bounds how long a program may take to say what it is.
const versionTimeout = 5 * time.Second

// maxVersionOutput bounds what it may say, in bytes.
const maxVersionOutput = 4 << 10

// Version asks the program at path which Firecracker it is.
func Version(ctx context.Context, path string) (firecracker.Version, error) {
	return ask(ctx, path, "--version", func(out []byte) (firecracker.Version, error) {
		return firecracker.ParseVersionOutput("Firecracker", out)
	})
}

// SnapshotFormat asks the program at path in which format it writes the state of a VM: "6.0.0".
func SnapshotFormat(ctx context.Context, path string) (string, error) {
	format, err := ask(ctx, path, "--snapshot-version", func(out []byte) (firecracker.Version, error) {
		line, _, _ := bytes.Cut(out, []byte("\n")) // the VMM logs after it
		return firecracker.ParseVersion(string(bytes.TrimSpace(line)))
	})
	if err != nil {
		return "", err
	}
	return format.String(), nil
}

// ask runs the program at path with one flag and parses what it prints.
func ask(ctx context.Context, path, flag string, parse func([]byte) (firecracker.Version, error)) (firecracker.Version,
	error,
) {
	ctx, cancel := context.WithTimeoutCause(ctx, versionTimeout, fmt.Errorf("no answer within %s", versionTimeout))
	defer cancel()
	var out head
	cmd := exec.CommandContext(ctx, path, flag)
	cmd.Env, cmd.Stdout, cmd.WaitDelay = []string{}, &out, time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return firecracker.Version{}, fmt.Errorf("run %s %s: %w", path, flag, err)
	}
	v, err := parse(out.Bytes())
	if err != nil {
		return firecracker.Version{}, fmt.Errorf("run %s %s: %w", path, flag, err)
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
