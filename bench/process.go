package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/lab"
)

// phaseVerb is the first argument of a phase's process. The phase's name and its bench in JSON
// follow.
const phaseVerb = "measure-phase"

// outcome is what a phase's process prints, all at its end: nothing else runs while it measures.
type outcome struct {
	Samples []sample
	Err     string
}

// runPhase is such a process.
func runPhase(name, arguments string) error {
	b := &bench{}
	if err := json.Unmarshal([]byte(arguments), b); err != nil {
		return err
	}
	all := append(phases(true), calibrations[false].phase, calibrations[true].phase)
	i := slices.IndexFunc(all, func(p phase) bool { return p.name == name })
	if i < 0 {
		return fmt.Errorf("no phase %q", name)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, b.Limit, late(b.Limit))
	defer cancel()
	o := outcome{}
	if err := because(ctx, b.run(ctx, all[i])); err != nil {
		o.Err = err.Error()
	}
	o.Samples = b.samples.all
	return json.NewEncoder(os.Stdout).Encode(o)
}

func (b *bench) run(ctx context.Context, p phase) error {
	if err := b.prepare(); err != nil {
		return err
	}
	if b.Profile != "" {
		f, err := os.Create(b.Profile + "." + strings.ReplaceAll(p.name, "/", "-"))
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	return p.measure(b, ctx)
}

// process measures a phase in a process of its own, and removes what it leaves. base is a directory
// on a tmpfs.
func (b bench) process(ctx context.Context, p phase, base string) (samples []sample, err error) {
	if b.Disk, err = os.MkdirTemp("", "smartvm-bench-"); err != nil {
		return nil, err
	}
	if b.Dir, err = os.MkdirTemp(base, "smartvm-bench-"); err != nil {
		return nil, errors.Join(err, os.Remove(b.Disk))
	}
	defer func() { err = errors.Join(err, b.clean(context.WithoutCancel(ctx), p)) }()
	if p.guest {
		if err := b.guestFiles(ctx); err != nil {
			return nil, err
		}
	}
	// It ends by itself some time before it is ended, to say where it is.
	until, _ := ctx.Deadline()
	b.Limit = time.Until(until) * 3 / 4
	arguments, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	command := []string{self, phaseVerb, p.name, string(arguments)}
	var out bytes.Buffer
	if p.lab {
		err = runInLab(ctx, command, &out)
	} else {
		err = runHere(ctx, command, &out, p.own)
	}
	if err != nil {
		return nil, err
	}
	var o outcome
	if err := json.Unmarshal(out.Bytes(), &o); err != nil {
		return nil, fmt.Errorf("%q: %w", out.Bytes(), err)
	}
	if o.Err != "" {
		return nil, errors.New(o.Err)
	}
	return o.Samples, nil
}

func runHere(ctx context.Context, command []string, out *bytes.Buffer, own bool) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	interruptible(cmd)
	cmd.Stdout = out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if own {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWNET | unix.CLONE_NEWNS
	}
	runtime.LockOSThread() // Pdeathsig means the thread
	defer runtime.UnlockOSThread()
	return cmd.Run()
}

func runInLab(ctx context.Context, command []string, out *bytes.Buffer) error {
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return err
	}
	config, err := cache.Lab(ctx)
	if err != nil {
		return err
	}
	config.Command, config.Dir, config.Env = command, "/", []string{"PATH=" + os.Getenv("PATH")}
	config.Stdout, config.Stderr = out, os.Stderr
	status, err := lab.Run(ctx, config)
	if err == nil && status != 0 {
		err = fmt.Errorf("in the lab: exit status %d", status)
	}
	return err
}

// interruptible makes a command end in good order when its context does, if it still can.
func interruptible(cmd *exec.Cmd) {
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = guestTimeout
}

// cleanTimeout bounds the removal of what a phase has left.
const cleanTimeout = time.Minute

// clean removes what a phase has left, also after an error or a signal in the middle. Networks of
// its own end with its processes.
func (b *bench) clean(ctx context.Context, p phase) error {
	ctx, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	var errs []error
	for _, dir := range []string{b.runtimeDir(), b.cliDir()} {
		if _, err := os.Stat(dir); err == nil && !p.own {
			errs = append(errs, b.removeVMs(ctx, dir))
		}
	}
	return errors.Join(append(errs, kill(b.Dir), kill(b.Disk), os.RemoveAll(b.Dir), os.RemoveAll(b.Disk))...)
}

func (b *bench) removeVMs(ctx context.Context, dir string) error {
	h, err := smartvm.Open(smartvm.Options{RuntimeDir: dir, DataDir: b.dataDir()})
	if err != nil {
		return err
	}
	defer h.Close()
	if _, err := h.Recover(ctx); err != nil {
		return err
	}
	left, err := h.Machines(ctx)
	for _, m := range left {
		if _, stopErr := m.Stop(ctx, smartvm.StopOptions{}); stopErr != nil && !errors.Is(stopErr, smartvm.ErrState) {
			err = errors.Join(err, stopErr)
		}
		if removeErr := m.Remove(ctx); !errors.Is(removeErr, smartvm.ErrNotFound) {
			err = errors.Join(err, removeErr)
		}
	}
	return err
}

// kill ends the processes that work below a directory, or whose arguments name it.
func kill(dir string) error {
	all, err := filepath.Glob("/proc/[0-9]*")
	for _, process := range all {
		cwd, _ := os.Readlink(filepath.Join(process, "cwd"))
		arguments, _ := os.ReadFile(filepath.Join(process, "cmdline"))
		if !strings.HasPrefix(cwd, dir+"/") && cwd != dir && !bytes.Contains(arguments, []byte(dir)) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(process)) // as Glob's pattern has it
		if killErr := unix.Kill(pid, unix.SIGKILL); !errors.Is(killErr, unix.ESRCH) {
			err = errors.Join(err, killErr)
		}
	}
	return err
}
