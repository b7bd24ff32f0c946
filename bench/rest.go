package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"push.rocks/smartvm"
)

// The loop: so many VMs, so many at a time, in chunks that take turns with bare ones. All of it is
// done a few times over.
const (
	loopTimes       = 3
	loopVMs         = 200
	loopChunk       = 20
	loopConcurrency = 8
)

func (b *bench) loops(ctx context.Context) error {
	h, err := b.host(smartvm.LaunchDirect)
	if err != nil {
		return err
	}
	defer h.Close()
	ours := func(int) error {
		m, err := h.Create(ctx, b.spec())
		if err != nil {
			return err
		}
		if _, err := h.start(ctx, m); err != nil {
			return err
		}
		_, err = m.Stop(ctx, smartvm.StopOptions{})
		return errors.Join(err, m.Remove(ctx))
	}
	bare := func(i int) error {
		v, err := b.startBare(ctx, fmt.Sprintf("bare-loop-%d", i), b.idle)
		if err != nil {
			return err
		}
		return v.stop()
	}
	for range loopTimes * loopVMs / loopChunk {
		var rates [2]float64
		for _, way := range rand.Perm(2) {
			begun := time.Now()
			if err := each(ctx, loopChunk, []func(int) error{ours, bare}[way]); err != nil {
				return err
			}
			rates[way] = loopChunk / time.Since(begun).Seconds()
		}
		b.samples.add("loop", "VM/s", rates[0])
		b.samples.add("bare-loop", "VM/s", rates[1])
		b.samples.add("loop/bare-loop", "", rates[0]/rates[1])
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

// memory measures what an idle VM adds to this process, in KiB: resident, and heap and stacks of
// Go.
func (b *bench) memory(ctx context.Context) error {
	h, err := b.host(smartvm.LaunchDirect)
	if err != nil {
		return err
	}
	defer h.Close()
	start := func() error {
		m, err := h.Create(ctx, b.spec())
		if err == nil {
			_, err = h.start(ctx, m)
		}
		return err
	}
	if err := start(); err != nil { // what is needed once is not counted
		return err
	}
	residentBefore, heapBefore, err := ownMemory()
	if err != nil {
		return err
	}
	for range idleVMs {
		if err := start(); err != nil {
			return err
		}
	}
	resident, heap, err := ownMemory()
	b.samples.add("memory-per-vm", "KiB", (resident-residentBefore)/idleVMs)
	b.samples.add("heap-per-vm", "KiB", (heap-heapBefore)/idleVMs)
	return errors.Join(err, h.StopAll(ctx, smartvm.StopOptions{}))
}

// ownMemory is this process's resident memory, and that in Go's heap and stacks, in KiB.
func ownMemory() (resident, heap float64, err error) {
	debug.FreeOSMemory() // collects garbage first
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	resident, err = statusKiB(os.Getpid(), "VmRSS")
	return resident, float64(stats.HeapInuse+stats.StackInuse) / 1024, err
}

// statusKiB is a line of a process's status in /proc.
func statusKiB(pid int, name string) (float64, error) {
	value, _, _ := strings.Cut(field(fmt.Sprintf("/proc/%d/status", pid), name), " ")
	return strconv.ParseFloat(value, 64)
}

// command is the smartvm program with what it needs to find its way.
func (b *bench) command(ctx context.Context, args ...string) *exec.Cmd {
	args = append(args, "--runtime-dir", b.cliDir(), "--data-dir", b.dataDir(),
		"--firecracker", b.Firecracker, "--jailer", b.Jailer, "--launcher", "direct")
	cmd := exec.CommandContext(ctx, b.SmartVM, args...)
	interruptible(cmd)
	return cmd
}

// supervisor measures the process of a detached VM a second after its start, when it has settled.
func (b *bench) supervisor(ctx context.Context) (err error) {
	run := b.command(ctx, "run", "-d", "--name", "bench", "--kernel", b.idle, "--memory", "128")
	if out, err := run.Output(); err != nil {
		return fmt.Errorf("smartvm run -d: %w: %s", err, out)
	}
	defer func() { err = errors.Join(err, b.command(context.WithoutCancel(ctx), "rm", "-f", "bench").Run()) }()
	pid, err := b.supervisorPID(ctx)
	if err != nil {
		return err
	}
	time.Sleep(time.Second)
	kib, err := statusKiB(pid, "RssAnon") // the pages of the program are shared by all supervisors
	b.samples.add("supervise-memory", "MiB", kib/1024)
	return err
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

// commandLine compares whole processes: `smartvm run` of a guest that reboots at once, bare
// Firecracker, and a container.
func (b *bench) commandLine(ctx context.Context) error {
	ways := []func() error{
		func() error {
			took, err := b.runBare(ctx)
			b.samples.time("bare-run", took)
			return err
		},
		func() error {
			cmd := b.command(ctx, "run", "--kernel", b.reboot, "--memory", "128")
			begun := time.Now()
			out, err := cmd.Output()
			b.samples.time("cli-run", time.Since(begun))
			if err != nil {
				return fmt.Errorf("smartvm run: %w: %s", err, out)
			}
			return nil
		},
	}
	if b.Crun != "" {
		c, err := b.newCrun(ctx)
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench: crun is left out:", err)
		} else {
			defer c.end()
			ways = append(ways, func() error {
				took, err := c.run(ctx)
				b.samples.time("crun-run", took)
				return err
			})
		}
	}
	for round := range warmup + b.Rounds/2 {
		b.samples.counting = round >= warmup
		for _, i := range rand.Perm(len(ways)) {
			align(ctx, moment(round))
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := ways[i](); err != nil {
				return err
			}
		}
	}
	return nil
}
