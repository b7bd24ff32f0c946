package cgroup_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"push.rocks/smartvm/internal/cgroup"
)

func group(t *testing.T) *cgroup.Group {
	t.Helper()
	parent, err := cgroup.Parent("smartvm-test")
	if err != nil {
		t.Fatal(err)
	}
	if parent == "" {
		t.Skip("needs: a cgroup v2 hierarchy that this user may write")
	}
	return &cgroup.Group{Path: filepath.Join(parent, fmt.Sprintf("%s-%d", t.Name(), os.Getpid()))}
}

func sleeper(t *testing.T, g *cgroup.Group) *exec.Cmd {
	t.Helper()
	d, err := os.Open(g.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	cmd := exec.Command("sh", "-c", "sleep 1000 & sleep 1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestRevertKillsTheWholeGroup(t *testing.T) {
	g := group(t)
	if err := g.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := g.Apply(t.Context()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second Apply: %v, want fs.ErrExist", err)
	}
	cmd := sleeper(t, g)
	if alive, err := g.Populated(); !alive || err != nil {
		t.Errorf("Populated = %v, %v, want true", alive, err)
	}
	if err := g.Revert(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if s := cmd.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != syscall.SIGKILL {
		t.Errorf("process ended with %v, want SIGKILL", cmd.ProcessState)
	}
	if _, err := os.Stat(g.Path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("group after Revert: %v", err)
	}
	if err := g.Revert(t.Context()); err != nil {
		t.Errorf("second Revert: %v", err)
	}
	if alive, err := g.Populated(); alive || err != nil {
		t.Errorf("Populated of no group = %v, %v, want false", alive, err)
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	g := group(t)
	if err := g.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	cmd := sleeper(t, g)
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if err := g.Wait(ctx); !errors.Is(err, cause) {
		t.Errorf("Wait = %v, want %v", err, cause)
	}
	if err := g.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
}

// Where groups cannot be seen, that there is none says nothing; where they can, it says that no
// process is alive.
func TestNoGroup(t *testing.T) {
	real := group(t)
	hidden := &cgroup.Group{Path: filepath.Join(t.TempDir(), "none", "vm")}
	for name, ask := range map[string]func(*cgroup.Group) error{
		"populated": func(g *cgroup.Group) error { _, err := g.Populated(); return err },
		"processes": func(g *cgroup.Group) error { _, err := g.PIDs(); return err },
		"signal":    (*cgroup.Group).Signal,
		"kill":      func(g *cgroup.Group) error { return g.Kill(t.Context()) },
		"wait":      func(g *cgroup.Group) error { return g.Wait(t.Context()) },
		"revert":    func(g *cgroup.Group) error { return g.Revert(t.Context()) },
	} {
		if err := ask(hidden); err == nil || !strings.Contains(err.Error(), "is in no cgroup2 hierarchy") {
			t.Errorf("%s of a group that cannot be seen: %v", name, err)
		}
		if err := ask(real); err != nil {
			t.Errorf("%s of no group: %v", name, err)
		}
	}
	if alive, err := real.Populated(); alive || err != nil {
		t.Errorf("populated: %v, %v, want false", alive, err)
	}
}
