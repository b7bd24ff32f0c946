package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// buildTimeout bounds a first build of fctools, which fetches and compiles some 50 crates.
const buildTimeout = 10 * time.Minute

// buildFCTools builds the program in the directory fctools and returns its path.
func buildFCTools(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	fmt.Fprintln(os.Stderr, "bench: building fctools")
	cmd := exec.CommandContext(ctx, "cargo", "build", "--release", "--locked", "--quiet", "--target-dir", "target")
	interruptible(cmd)
	cmd.Dir = "fctools"
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build %s: %w", cmd.Dir, err)
	}
	return filepath.Abs("fctools/target/release/bench-fctools")
}

// fctools is a process that starts VMs with fctools, over and over. See fctools/src/main.rs.
type fctools struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startFCTools starts such a process. Its mode is start, restore or fork; args follow Firecracker's
// path.
func (b *bench) startFCTools(ctx context.Context, mode string, args ...string) (*fctools, error) {
	f := &fctools{cmd: exec.CommandContext(ctx, b.FCTools, append([]string{mode, b.Firecracker}, args...)...)}
	f.cmd.Stderr, f.cmd.Dir = os.Stderr, filepath.Join(b.Dir, "fctools-"+mode)
	out, outErr := f.cmd.StdoutPipe()
	in, inErr := f.cmd.StdinPipe()
	if err := errors.Join(outErr, inErr, os.Mkdir(f.cmd.Dir, 0o700)); err != nil {
		return nil, err
	}
	f.in, f.out = in, bufio.NewReader(out)
	return f, f.cmd.Start()
}

// start starts its VMs at a moment of the tick, stops them, and returns how long their start took.
func (f *fctools) start(ctx context.Context, at float64) (time.Duration, error) {
	if _, err := f.step(); err != nil {
		return 0, err
	}
	align(ctx, at)
	took, err := f.step()
	if err != nil {
		return 0, err
	}
	_, err = f.step()
	return took, err
}

// step makes it prepare, start or stop its VMs, in this order, and returns how long that took.
func (f *fctools) step() (time.Duration, error) {
	_, err := io.WriteString(f.in, "\n")
	if err != nil {
		return 0, fmt.Errorf("fctools: %w", err)
	}
	line, err := f.out.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("fctools: %w", err)
	}
	took, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	return time.Duration(took), err
}

// end ends it, after a whole start, or after an error.
func (f *fctools) end() error {
	return errors.Join(f.in.Close(), f.cmd.Wait(), os.RemoveAll(f.cmd.Dir))
}
