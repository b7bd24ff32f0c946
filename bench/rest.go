package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"push.rocks/smartvm"
)

// The loop: so many VMs, so many at a time, in chunks that take turns with bare ones.
const (
	loopVMs         = 200
	loopChunk       = 20
	loopConcurrency = 8
)

func (b *bench) loops(ctx context.Context) error {
	var watches sync.Map // of *watchMark, by VM id
	h, err := b.host(smartvm.LaunchDirect, func(id string) io.Writer {
		watch := &watchMark{make(chan time.Time, 1)}
		watches.Store(id, watch)
		return watch
	})
	if err != nil {
		return err
	}
	defer h.Close()
	ours := func(int) error {
		m, err := h.Create(ctx, b.spec())
		if err != nil {
			return err
		}
		if err := m.Start(ctx); err != nil {
			return errors.Join(err, m.Remove(ctx))
		}
		watch, _ := watches.LoadAndDelete(m.ID())
		<-watch.(*watchMark).seen
		_, err = m.Stop(ctx, smartvm.StopOptions{})
		return errors.Join(err, m.Remove(ctx))
	}
	bare := func(i int) error {
		v, err := b.startBare(fmt.Sprintf("bare-loop-%d", i), b.idle)
		if err != nil {
			return err
		}
		return v.stop()
	}
	for range loopVMs / loopChunk {
		for _, way := range []struct {
			name string
			once func(int) error
		}{{"loop", ours}, {"bare-loop", bare}} {
			begun := time.Now()
			if err := each(ctx, loopChunk, way.once); err != nil {
				return err
			}
			b.report.add(way.name, "VM/s", loopChunk/time.Since(begun).Seconds())
		}
	}
	return nil
}

// each calls once n times, loopConcurrency at a time.
func each(ctx context.Context, n int, once func(int) error) error {
	errs := make([]error, n)
	slots := make(chan struct{}, loopConcurrency)
	var wg sync.WaitGroup
	for i := range n {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if errs[i] = context.Cause(ctx); errs[i] == nil {
				errs[i] = once(i)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

const idleVMs = 50

// memory measures in a process of its own what an idle VM adds to it.
func (b *bench) memory(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, "-idle-vms", strconv.Itoa(idleVMs))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("measure memory: %w", err)
	}
	kib, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
	if err != nil {
		return fmt.Errorf("measure memory: %w", err)
	}
	b.report.add("memory-per-vm", "KiB", kib)
	return nil
}

func (b *bench) printIdleMemory(ctx context.Context, n int) error {
	h, err := b.host(smartvm.LaunchDirect, nil)
	if err != nil {
		return err
	}
	defer h.Close()
	var all []*smartvm.Machine
	start := func() error {
		m, err := h.Create(ctx, b.spec())
		if err != nil {
			return err
		}
		all = append(all, m)
		return m.Start(ctx)
	}
	err = start() // what is needed once is not counted
	before := residentKiB(os.Getpid())
	for range n {
		err = errors.Join(err, start())
	}
	after := residentKiB(os.Getpid())
	err = errors.Join(err, h.StopAll(ctx, smartvm.StopOptions{}))
	for _, m := range all {
		err = errors.Join(err, m.Remove(ctx))
	}
	fmt.Printf("%.1f\n", (after-before)/float64(n))
	return err
}

func residentKiB(pid int) float64 {
	if pid == os.Getpid() {
		debug.FreeOSMemory()
	}
	value, _, _ := strings.Cut(field(fmt.Sprintf("/proc/%d/status", pid), "VmRSS"), " ")
	kib, _ := strconv.ParseFloat(value, 64)
	return kib
}

// command is the smartvm program with what it needs to find its way.
func (b *bench) command(ctx context.Context, args ...string) *exec.Cmd {
	args = append(args, "--runtime-dir", filepath.Join(b.dir, "cli"), "--data-dir", filepath.Join(b.dir, "data"),
		"--firecracker", b.firecracker, "--jailer", b.jailer, "--launcher", "direct")
	cmd := exec.CommandContext(ctx, b.smartvm, args...)
	cmd.Stderr = os.Stderr
	return cmd
}

// supervisor measures the process of a detached VM a second after its start, when it has settled.
func (b *bench) supervisor(ctx context.Context) (err error) {
	run := b.command(ctx, "run", "-d", "--name", "bench", "--kernel", b.idle, "--memory", "128")
	if out, err := run.Output(); err != nil {
		return fmt.Errorf("smartvm run -d: %w: %s", err, out)
	}
	defer func() { err = errors.Join(err, b.command(ctx, "rm", "-f", "bench").Run()) }()
	pid, err := b.supervisorPID(ctx)
	if err != nil {
		return err
	}
	time.Sleep(time.Second)
	b.report.add("supervise-rss", "MiB", residentKiB(pid)/1024)
	return nil
}

// supervisorPID finds the process whose command line is that of the bench's only supervisor.
func (b *bench) supervisorPID(ctx context.Context) (int, error) {
	var machine struct {
		ID string `json:"id"`
	}
	out, err := b.command(ctx, "inspect", "-o", "json", "bench").Output()
	if err != nil {
		return 0, fmt.Errorf("smartvm inspect: %w", err)
	}
	if err := json.Unmarshal(bytes.Trim(bytes.TrimSpace(out), "[]"), &machine); err != nil {
		return 0, fmt.Errorf("smartvm inspect: %w", err)
	}
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, path := range paths {
		line, err := os.ReadFile(path)
		if err == nil && bytes.Contains(line, []byte("\x00supervise\x00")) && bytes.Contains(line, []byte(machine.ID)) {
			return strconv.Atoi(filepath.Base(filepath.Dir(path)))
		}
	}
	return 0, fmt.Errorf("no supervisor of VM %s", machine.ID)
}

// commandLine compares whole processes: `smartvm run` of a guest that reboots at once, and bare Firecracker.
func (b *bench) commandLine(ctx context.Context) error {
	for round := range warmup + b.rounds/2 {
		b.report.counting = round >= warmup
		took, err := b.runBare(ctx)
		if err != nil {
			return err
		}
		b.report.time("bare-run", took)
		cmd := b.command(ctx, "run", "--kernel", b.reboot, "--memory", "128")
		begun := time.Now()
		if out, err := cmd.Output(); err != nil {
			return fmt.Errorf("smartvm run: %w: %s", err, out)
		}
		b.report.time("cli-run", time.Since(begun))
	}
	return nil
}
