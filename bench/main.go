// Command bench measures smartvm against bare Firecracker and firecracker-go-sdk, in one interleaved run on the
// real VMM with a guest of some dozen instructions. It prints a table, writes it as JSON, and exits with 1 when a
// ratio misses its bar.
//
// Rows, all of VMs with one CPU and 128 MiB:
//
//   - bare: spawn of Firecracker with a configuration file and no API, until the guest's first byte arrives.
//
//   - start, start-jailed: the call of Machine.Start, by the two launchers, until the guest's first byte arrives at
//     the writer that Options.Console gave.
//
//   - create: the call of Host.Create, which stages the drive.
//
//   - go-sdk: NewMachine and Start of firecracker-go-sdk with its own defaults, until the guest's first byte arrives.
//
//   - stop: Machine.Stop without patience; bare-kill: SIGKILL until the process is reaped.
//
//   - loop, bare-loop: VMs a second, eight at a time, from nothing to the first byte and back to nothing.
//
//   - memory-per-vm, heap-per-vm: what an idle VM adds to this process, resident and in Go's heap and stacks.
//
//   - supervise-rss: the resident process that looks after a detached VM.
//
//   - cli-run, bare-run: a guest that reboots at once, from spawn to exit of the whole program.
//
//   - stage: Host.Create of a VM whose image has 1 GiB, 900 MiB of them data; stage-copied: how much of it was copied; cp: a
//     copy of the same; 20-vms-of-image: what 20 such VMs take, in per cent of the image.
//
//   - pull: smartvm image pull, the whole program, of ten layers with 300 MiB from a registry in this process; pull-memory:
//     the most that program had resident; tar: tar -xzf of the same layers onto the same disk.
//
//   - guest-*, agent-*: in real guests of the minimal image, in the lab where this machine boots none (such rows are marked; one run's
//     ratios alone count). guest-kernel: the guest's kernel until it runs the agent; guest-modules, guest-mounts: what that takes for the agent's
//     modules and the root's layers; agent-start: until the agent's own code runs; agent-boot: all of the way from the kernel to the image's
//     command but modules and mounts. guest-exec: exec of true, the whole call; guest-connect: CONNECT and the echo of a byte on the same
//     vsock; guest-spawn: fork, exec and end of true, timed in the guest. guest-copy-to and -from: cp of 256 MiB to the guest's memory and back;
//     guest-stream-to and -from: as much through bare vsock streams. agent-rss: the idle agent as process 1, after all that. guest-throughput:
//     one TCP connection of iperf3's from a guest to the host, each half second of it; guest-throughput-no-rules: the same without our rules;
//     guest-throughput-conntrack-only: with no more in their place than what has the kernel know connections.
//
//   - restore: the call of Machine.Start of a VM of a snapshot, 256 MiB with 64 MiB written to, until it goes on; create-restored:
//     the call of Host.Restore before; bare-restore: spawn of Firecracker until it has loaded the same and resumed.
//
//   - fork: the same as restore for each of 50 VMs, eight at a time, as the host logs it; fork-rate, bare-fork-rate: such VMs a second, from nothing;
//     fork-private: what each adds to the memory that no other process shares, the VMM's and this process's.
//
//   - uffd-faults: times that a VM of a snapshot waited for its memory while it read 64 MiB, served by smartvm, with what one
//     before it had touched brought ahead; uffd-faults-none: that one.
//
// All but the loops, the images and the snapshots have one drive of 64 MiB, 8 MiB of them data, the rest a hole. Start gets a copy of its own, which
// create makes; the others use the file itself.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/tinyguest"
)

func main() {
	if len(os.Args) == 6 && os.Args[1] == networkVerb {
		if err := measureNetworks(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(2)
		}
		return
	}
	if len(os.Args) == 5 && os.Args[1] == guestVerb {
		if err := measureGuests(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(2)
		}
		return
	}
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
	firecracker, jailer, smartvm, iperf3 string
	dir                                  string // on a tmpfs, removed at the end
	idle, reboot                         string // kernels: one that prints mark and stays, one that reboots at once
	drive                                string // 64 MiB, 8 MiB of them data
	rounds                               int
	report                               *report
}

func run(ctx context.Context) (ok bool, err error) {
	out := flag.String("out", "results.json", "`file` for the results")
	rounds := flag.Int("n", 150, "rounds of every start measurement")
	cli := flag.String("smartvm", "../bin/smartvm", "the smartvm `program`")
	only := flag.String("only", "", "the `measurements` to make, of starts,loops,memory,snapshots,supervisor,command-line,staging,pulls,networks,guests")
	base := flag.String("runtime-dir", "/dev/shm", "existing `directory` to work below, on a tmpfs")
	profile := flag.String("cpuprofile", "", "`file` for a CPU profile of this process")
	idleVMs := flag.Int("idle-vms", 0, "measure this process's memory with so many idle VMs, print it and exit")
	flag.Parse()
	b := &bench{rounds: *rounds}
	if b.smartvm, err = filepath.Abs(*cli); err != nil {
		return false, err
	}
	if b.dir, err = os.MkdirTemp(*base, "smartvm-bench-"); err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, b.clean(context.WithoutCancel(ctx))) }()
	if err := b.prepare(ctx); err != nil {
		return false, err
	}
	if *idleVMs > 0 {
		return true, b.printIdleMemory(ctx, *idleVMs)
	}
	if *profile != "" {
		f, err := os.Create(*profile)
		if err != nil {
			return false, err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return false, err
		}
		defer pprof.StopCPUProfile()
	}
	b.report = newReport(ctx, b.firecracker)
	failed := b.measure(ctx, *only)
	b.report.ratios()
	b.report.print(os.Stdout)
	missed := b.report.missed()
	if len(missed) > 0 {
		fmt.Fprintln(os.Stderr, "bench: missed:", strings.Join(missed, ", "))
	}
	return len(missed) == 0, errors.Join(failed, b.report.write(*out))
}

// measure makes the measurements in a list, all if it is empty.
func (b *bench) measure(ctx context.Context, list string) error {
	all := []struct {
		name string
		make func(context.Context) error
	}{
		{"starts", b.starts},
		{"loops", b.loops},
		{"memory", b.memory},
		{"snapshots", b.snapshots},
		{"supervisor", b.supervisor},
		{"command-line", b.commandLine},
		{"staging", b.staging},
		{"pulls", b.pulls},
		{"networks", b.networks},
		{"guests", b.guests},
	}
	wanted := strings.Split(list, ",")
	for _, m := range all {
		if list != "" && !slices.Contains(wanted, m.name) {
			continue
		}
		begun := time.Now()
		if err := m.make(ctx); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		fmt.Fprintf(os.Stderr, "bench: %s measured in %.0f s\n", m.name, time.Since(begun).Seconds())
	}
	return nil
}

// clean removes everything, also after an error or a signal in the middle.
func (b *bench) clean(ctx context.Context) error {
	var errs []error
	for _, dir := range []string{b.runtimeDir(), b.cliDir()} {
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		errs = append(errs, b.removeVMs(ctx, dir))
	}
	return errors.Join(append(errs, os.RemoveAll(b.dir))...)
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

func (b *bench) runtimeDir() string { return filepath.Join(b.dir, "runtime") }
func (b *bench) cliDir() string     { return filepath.Join(b.dir, "cli") }
func (b *bench) dataDir() string    { return filepath.Join(b.dir, "data") }

func (b *bench) prepare(ctx context.Context) error {
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return err
	}
	cache.Messages = os.Stderr
	paths, err := cache.Ensure(ctx, fixtures.Firecracker, fixtures.Jailer, fixtures.IPerf3)
	if err != nil {
		return err
	}
	b.firecracker, b.jailer, b.iperf3 = paths[0], paths[1], paths[2]
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

func (b *bench) spec(drives ...smartvm.Drive) smartvm.Spec {
	return smartvm.Spec{
		BootSource:    smartvm.BootSource{KernelImagePath: b.idle},
		MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
		Drives:        drives,
	}
}
