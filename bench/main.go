// Command bench measures smartvm against bare Firecracker and firecracker-go-sdk, in one interleaved run on the
// real VMM with a guest of some dozen instructions. It prints a table, writes it as JSON, and exits with 1 when a
// ratio misses its bar.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/tinyguest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ok, err := run(ctx)
	stop()
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	case !ok:
		os.Exit(1)
	}
}

// mark is what the guest prints: a byte that the VMM never writes to its log.
const mark = "\x07"

// bench is what every measurement needs.
type bench struct {
	firecracker, jailer, smartvm string
	dir                          string // on a tmpfs, removed at the end
	idle, reboot                 string // kernels: one that prints mark and stays, one that reboots at once
	drive                        string // 64 MiB, 8 MiB of them data
	rounds                       int
	report                       *report
}

func run(ctx context.Context) (ok bool, err error) {
	out := flag.String("out", "results.json", "`file` for the results")
	rounds := flag.Int("n", 60, "rounds of every start measurement")
	cli := flag.String("smartvm", "../bin/smartvm", "the smartvm `program`")
	only := flag.String("only", "", "the one measurement to make: starts, loops, memory, supervisor or command-line")
	idleVMs := flag.Int("idle-vms", 0, "measure this process's memory with so many idle VMs, print it and exit")
	flag.Parse()
	b := &bench{rounds: *rounds}
	if b.smartvm, err = filepath.Abs(*cli); err != nil {
		return false, err
	}
	if b.dir, err = os.MkdirTemp("/dev/shm", "smartvm-bench-"); err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if err := b.prepare(ctx); err != nil {
		return false, err
	}
	if *idleVMs > 0 {
		return true, b.printIdleMemory(ctx, *idleVMs)
	}
	b.report = newReport(ctx, b.firecracker)
	for _, m := range []struct {
		name string
		make func(context.Context) error
	}{
		{"starts", b.starts}, {"loops", b.loops}, {"memory", b.memory}, {"supervisor", b.supervisor}, {"command-line", b.commandLine},
	} {
		if *only != "" && *only != m.name {
			continue
		}
		if err := m.make(ctx); err != nil {
			return false, err
		}
	}
	b.report.ratios()
	b.report.print(os.Stdout)
	return b.report.ok(), b.report.write(*out)
}

func (b *bench) prepare(ctx context.Context) error {
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return err
	}
	cache.Messages = os.Stderr
	paths, err := cache.Ensure(ctx, fixtures.Firecracker, fixtures.Jailer)
	if err != nil {
		return err
	}
	b.firecracker, b.jailer = paths[0], paths[1]
	for _, g := range []struct {
		path  *string
		guest tinyguest.Guest
	}{
		{&b.idle, tinyguest.Guest{Message: mark, Then: tinyguest.Idle}},
		{&b.reboot, tinyguest.Guest{Message: mark, Then: tinyguest.Reboot}},
	} {
		*g.path = filepath.Join(b.dir, fmt.Sprintf("guest-%d", g.guest.Then))
		if err := os.WriteFile(*g.path, tinyguest.Image(g.guest), 0o644); err != nil {
			return err
		}
	}
	b.drive = filepath.Join(b.dir, "drive")
	data := make([]byte, 8<<20)
	for i := range data {
		data[i] = byte(i)
	}
	return errors.Join(os.WriteFile(b.drive, data, 0o644), os.Truncate(b.drive, 64<<20))
}

func (b *bench) host(launcher smartvm.Launcher, console func(id string) io.Writer) (*smartvm.Host, error) {
	return smartvm.Open(smartvm.Options{
		RuntimeDir: filepath.Join(b.dir, "runtime"), DataDir: filepath.Join(b.dir, "data"),
		FirecrackerBinary: b.firecracker, JailerBinary: b.jailer, Launcher: launcher, Console: console,
	})
}

func (b *bench) spec(drives ...smartvm.Drive) smartvm.Spec {
	return smartvm.Spec{
		BootSource:    smartvm.BootSource{KernelImagePath: b.idle},
		MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
		Drives:        drives,
	}
}
