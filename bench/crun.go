package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/fixtures"
)

// findCrun installs crun and makes its root file system, where they are missing.
func (b *bench) findCrun(ctx context.Context, cache fixtures.Cache) error {
	if os.Geteuid() != 0 {
		return errors.New("it needs root")
	}
	paths, err := cache.Ensure(ctx, fixtures.Crun, fixtures.Debian)
	if err != nil {
		return err
	}
	b.Crun, b.Debian = paths[0], paths[1]
	return nil
}

// crun runs a container of the distribution's root file system, as a whole process each time.
type crun struct {
	program, bundle, state string // program and directories
	id                     string // of the container, and of its cgroup
	starts                 chan start
}

// start asks for the start of a command on the thread that has the mounts.
type start struct {
	cmd  *exec.Cmd
	done chan error
}

// newCrun unpacks the root file system and makes a bundle of it whose command is true.
func (b *bench) newCrun(ctx context.Context) (*crun, error) {
	c := &crun{
		program: b.Crun, bundle: filepath.Join(b.Disk, "bundle"), state: filepath.Join(b.Dir, "crun"),
		id: filepath.Base(b.Disk), starts: make(chan start),
	}
	root := filepath.Join(c.bundle, "rootfs")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "tar", "-xf", b.Debian, "-C", root).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("unpack %s: %w: %s", b.Debian, err, out)
	}
	type object = map[string]any
	config, err := json.Marshal(object{
		"ociVersion": "1.0.2",
		"process": object{
			"args": []string{"true"}, "env": []string{"PATH=/usr/bin"}, "cwd": "/",
			"user": object{"uid": 0, "gid": 0},
		},
		"root": object{"path": "rootfs"},
		"mounts": []object{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "mode=755"}},
		},
		"linux": object{"namespaces": []object{
			{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"},
		}},
	})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(c.bundle, "config.json"), config, 0o644); err != nil {
		return nil, err
	}
	ready := make(chan error)
	go c.serve(ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	if _, err := c.run(ctx); err != nil { // there are hosts that allow no containers
		c.end()
		return nil, err
	}
	return c, nil
}

// serve starts commands in a mount namespace of their own until end is called. There /sys/fs/cgroup
// is cgroup2: crun refuses hosts that have both versions.
func (c *crun) serve(ready chan<- error) {
	runtime.LockOSThread() // for good: the thread ends with this
	err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil {
		err = unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "")
	}
	if err != nil {
		ready <- fmt.Errorf("make a mount namespace for crun: %w", err)
		return
	}
	close(ready)
	for s := range c.starts {
		s.done <- s.cmd.Start()
	}
}

func (c *crun) end() { close(c.starts) }

// run runs the container once.
func (c *crun) run(ctx context.Context) (time.Duration, error) {
	cmd := exec.CommandContext(ctx, c.program, "--root", c.state, "--cgroup-manager", "cgroupfs", "run", "--bundle",
		c.bundle, c.id)
	interruptible(cmd)
	s := start{cmd, make(chan error)}
	begun := time.Now()
	c.starts <- s
	if err := <-s.done; err != nil {
		return 0, err
	}
	err := cmd.Wait()
	took := time.Since(begun)
	if err != nil {
		return 0, fmt.Errorf("crun: %w", err)
	}
	return took, nil
}
