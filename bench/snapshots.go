package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/tinyguest"
	"push.rocks/smartvm/internal/vmm"
)

// Forks: so many of a VM of that size, that has written to so much of its memory.
const (
	forkTimes  = 30
	forks      = 50
	forkMiB    = 256
	forkDirty  = 64 << 20 / tinyguest.PageSize
	bareSocket = "api.socket"
)

// snapshots measures from spawn, or the call of Restore, until a VM of a snapshot goes on.
func (b *bench) snapshots(ctx context.Context) (err error) {
	h, err := b.host(smartvm.LaunchDirect)
	if err != nil {
		return err
	}
	defer h.Close()
	sn, done, err := b.template(ctx, h, tinyguest.Idle)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	if err := b.restores(ctx, h, sn); err != nil {
		return err
	}
	if err := b.forks(ctx, sn.ID); err != nil {
		return err
	}
	if err := b.forkAtOnce(ctx, sn); err != nil {
		return err
	}
	return b.faults(ctx, h)
}

// faults counts how often a guest that reads all that it has written waits for a page, without and
// with what was recorded.
func (b *bench) faults(ctx context.Context, h *host) (err error) {
	sn, done, err := b.template(ctx, h, tinyguest.Sweep)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	dots, err := b.hostFor(smartvm.LaunchDirect, ".", nil) // one for each sweep
	if err != nil {
		return err
	}
	defer dots.Close()
	for _, name := range []string{"uffd-faults-none", "uffd-faults"} {
		m, err := dots.Restore(ctx, sn.ID, smartvm.RestoreOptions{Memory: smartvm.MemoryUFFD})
		if err != nil {
			return err
		}
		if _, err := dots.start(ctx, m); err != nil {
			return err
		}
		stats, _ := m.MemoryStats()
		b.samples.add(name, "faults", float64(stats.Faults))
		_, err = m.Stop(ctx, smartvm.StopOptions{})
		if err := errors.Join(err, m.Remove(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// template is a snapshot of a VM that has written to its memory, and is gone.
func (b *bench) template(ctx context.Context, h *host, then tinyguest.Then) (*smartvm.Snapshot, func() error, error) {
	kernel := filepath.Join(b.Dir, "template")
	if err := os.WriteFile(kernel, tinyguest.Image(tinyguest.Guest{Pages: forkDirty, Message: mark, Then: then}),
		0o644); err != nil {
		return nil, nil, err
	}
	spec := b.spec()
	spec.BootSource.KernelImagePath, spec.MachineConfig.MemSizeMiB = kernel, forkMiB
	m, err := h.Create(ctx, spec)
	if err != nil {
		return nil, nil, err
	}
	if _, err := h.start(ctx, m); err != nil {
		return nil, nil, err
	}
	begun := time.Now()
	sn, err := m.Snapshot(ctx, smartvm.SnapshotOptions{})
	if err != nil {
		return nil, nil, err
	}
	b.samples.time("snapshot", time.Since(begun))
	b.samples.time("snapshot-paused", sn.Paused)
	_, err = m.Stop(ctx, smartvm.StopOptions{})
	return sn, func() error { return h.RemoveSnapshot(ctx, sn.ID, true) }, errors.Join(err, m.Remove(ctx))
}

func (b *bench) restores(ctx context.Context, h *host, sn *smartvm.Snapshot) (err error) {
	ways := []func(at float64) error{
		func(at float64) error { return b.bareRestore(ctx, at, sn) },
		func(at float64) error { return b.ourRestore(ctx, at, h, sn) },
	}
	if b.FCTools != "" {
		f, err2 := b.startFCTools(ctx, "restore", sn.Path("state"), sn.Path("memory"))
		if err2 != nil {
			return err2
		}
		defer func() { err = errors.Join(err, f.end()) }()
		ways = append(ways, func(at float64) error {
			took, err := f.start(ctx, at)
			b.samples.time("fctools-restore", took)
			return err
		})
	}
	for round := range warmup + b.Rounds {
		b.samples.counting = round >= warmup
		for _, i := range rand.Perm(len(ways)) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := ways[i](moment(round)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) bareRestore(ctx context.Context, at float64, sn *smartvm.Snapshot) error {
	align(ctx, at)
	v, err := b.loadBare(ctx, "bare-restore", sn)
	if err != nil {
		return err
	}
	b.samples.time("bare-restore", v.took)
	return v.stop()
}

func (b *bench) ourRestore(ctx context.Context, at float64, h *host, sn *smartvm.Snapshot) error {
	begun := time.Now()
	m, err := h.Restore(ctx, sn.ID, smartvm.RestoreOptions{})
	if err != nil {
		return err
	}
	created := time.Since(begun)
	align(ctx, at)
	begun = time.Now()
	if err := m.Start(ctx); err != nil {
		return err
	}
	b.samples.time("restore", time.Since(begun))
	b.samples.time("create-restored", created)
	_, err = m.Stop(ctx, smartvm.StopOptions{})
	return errors.Join(err, m.Remove(ctx))
}

// loadBare starts Firecracker and has it load and resume a snapshot, and nothing else.
func (b *bench) loadBare(ctx context.Context, name string, sn *smartvm.Snapshot) (*bare, error) {
	v := &bare{dir: filepath.Join(b.Dir, name)}
	if err := os.Mkdir(v.dir, 0o700); err != nil {
		return nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	v.out = null
	v.cmd = exec.CommandContext(ctx, b.Firecracker, "--api-sock", bareSocket, "--level", "Error")
	v.cmd.Stdout, v.cmd.Dir = null, v.dir
	begun := time.Now()
	if err := v.cmd.Start(); err != nil {
		return nil, err
	}
	version, err := firecracker.ParseVersion(sn.Firecracker)
	if err != nil {
		return nil, err
	}
	c := firecracker.New(func(ctx context.Context) (net.Conn, error) {
		return vmm.DialSocket(ctx, v.dir, bareSocket)
	}, version)
	load := firecracker.SnapshotLoadParams{
		SnapshotPath: sn.Path("state"), ResumeVM: true,
		MemBackend: &firecracker.MemBackend{BackendType: firecracker.MemBackendFile, BackendPath: sn.Path("memory")},
	}
	for deadline := begun.Add(guestTimeout); ; nap(200 * time.Microsecond) {
		err := c.LoadSnapshot(ctx, load)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrNotExist) && !strings.Contains(err.Error(), "refused") || time.Now().After(deadline) {
			return nil, errors.Join(err, c.Close(), v.stop())
		}
	}
	v.took = time.Since(begun)
	return v, c.Close()
}

// forks makes many VMs of a snapshot, and as many bare ones and of fctools', in turns.
func (b *bench) forks(ctx context.Context, snapshot string) (err error) {
	b.samples.counting = true
	took := make(startTimes, forks)
	h, err := b.hostFor(smartvm.LaunchDirect, mark, slog.New(took))
	if err != nil {
		return err
	}
	defer h.Close()
	sn, err := h.Snapshot(snapshot)
	if err != nil {
		return err
	}
	ways := []func() (rate float64, err error){
		func() (float64, error) { return b.forkOurs(ctx, sn, took) },
		func() (float64, error) { return b.forkBare(ctx, sn, forks) },
	}
	if b.FCTools != "" {
		f, err2 := b.startFCTools(ctx, "fork", sn.Path("state"), sn.Path("memory"),
			strconv.Itoa(forks), strconv.Itoa(loopConcurrency))
		if err2 != nil {
			return err2
		}
		defer func() { err = errors.Join(err, f.end()) }()
		ways = append(ways, func() (float64, error) {
			took, err := f.start(ctx, 0)
			return forks / took.Seconds(), err
		})
	}
	for range forkTimes {
		rates := make([]float64, len(ways))
		for _, i := range rand.Perm(len(ways)) {
			if rates[i], err = ways[i](); err != nil {
				return err
			}
		}
		b.samples.add("fork-rate", "VM/s", rates[0])
		for i, peer := range []string{"bare", "fctools"}[:len(ways)-1] {
			b.samples.add(peer+"-fork-rate", "VM/s", rates[i+1])
			b.samples.add("fork-rate/"+peer, "", rates[0]/rates[i+1])
		}
	}
	return nil
}

// startTimes are the host's own, as it logs them.
type startTimes chan time.Duration

func (startTimes) Enabled(context.Context, slog.Level) bool { return true }
func (s startTimes) WithAttrs([]slog.Attr) slog.Handler     { return s }
func (s startTimes) WithGroup(string) slog.Handler          { return s }
func (s startTimes) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if r.Message == "started" && a.Key == "dur" {
			s <- a.Value.Duration()
		}
		return true
	})
	return nil
}

func (b *bench) forkOurs(ctx context.Context, sn *smartvm.Snapshot, took startTimes) (rate float64, err error) {
	before := privateKiB("self")
	begun := time.Now()
	all, err := sn.Fork(ctx, forks, smartvm.ForkOptions{Concurrency: loopConcurrency})
	if err != nil {
		return 0, err
	}
	rate = forks / time.Since(begun).Seconds()
	for range forks {
		select {
		case d := <-took:
			b.samples.time("fork", d)
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
	private := privateKiB("self") - before
	for _, m := range all {
		in, err := m.Inspect(ctx)
		if err != nil {
			return 0, err
		}
		for _, pid := range in.PIDs {
			private += privateKiB(strconv.Itoa(pid))
		}
	}
	b.samples.add("fork-private", "MiB", private/1024/forks)
	return rate, removeAll(ctx, all)
}

func removeAll(ctx context.Context, all []*smartvm.Machine) error {
	return each(ctx, len(all), func(i int) error {
		_, err := all[i].Stop(ctx, smartvm.StopOptions{})
		return errors.Join(err, all[i].Remove(ctx))
	})
}

// forkBare has n bare VMs load a snapshot, some at a time, and says how many a second did.
func (b *bench) forkBare(ctx context.Context, sn *smartvm.Snapshot, n int) (rate float64, err error) {
	all := make([]*bare, n)
	begun := time.Now()
	err = each(ctx, n, func(i int) (err error) {
		all[i], err = b.loadBare(ctx, fmt.Sprint("bare-fork-", i), sn)
		return err
	})
	rate = float64(n) / time.Since(begun).Seconds()
	for _, v := range all {
		if v != nil {
			if n == forks {
				b.samples.time("bare-fork", v.took)
			}
			err = errors.Join(err, v.stop())
		}
	}
	return rate, err
}

// privateKiB is the memory of a process that no other shares.
func privateKiB(pid string) (sum float64) {
	text, _ := os.ReadFile(filepath.Join("/proc", pid, "smaps_rollup")) // a kernel thread has none
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 3 && (f[0] == "Private_Clean:" || f[0] == "Private_Dirty:") {
			n, _ := strconv.ParseFloat(f[1], 64)
			sum += n
		}
	}
	return sum
}
