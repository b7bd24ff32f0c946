// Command bench measures smartvm against bare Firecracker, firecracker-go-sdk and fctools, in one
// interleaved run on the real VMM with a guest of some dozen instructions. It prints a table,
// writes it as JSON, and exits with 1 when a ratio misses its bar.
//
// Each measurement runs in a process of its own, those of guests in a lab of their own where this
// machine boots none. Each has a deadline: what is expected of it, times this machine's pace, times
// some slack. One that fails or passes its deadline is ended, what it leaves is removed, and it is
// made once more, without what it measured before. If that fails too, the others go on; the report
// names it, and the exit status is 2.
//
// A measurement of which a ratio misses its bar is made once more, too. The second value counts,
// and the report shows both.
//
// Rows, all of VMs with one CPU and 128 MiB:
//
//   - bare: spawn of Firecracker with a configuration file and no API, until the guest's first byte
//     arrives.
//
//   - start, start-jailed: the call of Machine.Start, by the two launchers, until the guest's first
//     byte arrives at the writer that Options.Console gave.
//
//   - create: the call of Host.Create, which stages the drive.
//
//   - go-sdk: NewMachine and Start of firecracker-go-sdk with its own defaults, until the guest's
//     first byte arrives.
//
//   - fctools: Vm::start of the Rust crate fctools, which sends the configuration by API calls,
//     until the guest's first byte arrives. Vm::prepare comes before, as create does before start.
//     A process of fctools/ takes the times of all VMs, so neither its own start nor the pipe to it
//     counts. Where cargo cannot build it, the rows of fctools are left out.
//
//   - stop: Machine.Stop without patience; bare-kill: SIGKILL until the process is reaped.
//
//   - loop, bare-loop: VMs a second, eight at a time, from nothing to the first byte and back to
//     nothing.
//
//   - memory-per-vm, heap-per-vm: what an idle VM adds to this process, resident and in Go's heap
//     and stacks.
//
//   - supervise-memory: the process that supervises a detached VM, without what it shares with
//     others.
//
//   - cli-run, bare-run: a guest that reboots at once, from spawn to exit of the whole program.
//
//   - crun-run: crun run of true in the distribution's root file system, from spawn to exit of the
//     whole program: namespaces and a cgroup are made, and true uses this machine's kernel, so
//     nothing boots. In cli-run a VM boots, but its guest is no Linux and has no file system. So
//     run/crun compares what each takes around a command, and has no bar. It needs root; where crun
//     cannot be had or runs no container, the row is left out.
//
//   - stage: Host.Create of a VM whose image has 1 GiB, 900 MiB of them data; stage-copied: how
//     much of it was copied; cp: a copy of the same; 20-vms-of-image: what 20 such VMs take, in per
//     cent of the image.
//
//   - pull: smartvm image pull, the whole program, of ten layers with 300 MiB, 40 % of that as they
//     are sent, from a registry in this process over a link of 1 Gbit/s; pull-memory: the most that
//     program had resident; tar: curl of the same layers over the same link, and then tar -xzf of
//     them onto the same disk; tar-piped: curl | tar -xz of each in turn.
//
//   - guest-*, agent-*: in real guests of the minimal image, in the lab where this machine boots
//     none (such rows are marked; one run's ratios alone count). guest-kernel: the guest's kernel
//     until it runs the agent; guest-modules, guest-mounts: what that takes for the agent's modules
//     and the root's layers; agent-start: until the agent's own code runs; agent-boot: all of the
//     way from the kernel to the image's command but modules and mounts. guest-exec: exec of true,
//     the whole call; guest-connect: CONNECT and the echo of a byte on the same vsock; guest-spawn:
//     fork, exec and end of true, timed in the guest. guest-copy-to and -from: cp of 256 MiB to the
//     guest's memory and back; guest-stream-to and -from: as much through bare vsock streams.
//     agent-rss: the idle agent as process 1, after all that. run-minimal: smartvm run minimal
//     true, the whole program; run-create, run-vmm (until it has taken its configuration),
//     run-guest (until it has ended, of which guest-* and agent-* are the parts) and run-end: the
//     same by the library.
//
//   - dns-new, dns-again: from a guest's question for a name that its policy allows, at its
//     network's gateway, until it has the answer, for the first time and once more; dns-direct: the
//     same question to the same upstream from the host; dns-added: what the way by the gateway
//     takes longer. The upstream takes 0.5 ms, as one of the same LAN or cloud does at the least.
//     dns-*-at-once: it takes no time, being another namespace of the same host. The guest is a
//     namespace too, and the proxy is in this process.
//
//   - heal-1, heal-100: from a flush of all rules of the host until the guests' are back, as they
//     look after themselves: what the policy of one allows gets through and what it denies does
//     not, and each guest has its part; with one guest and with a hundred, for each of which the
//     process that supervises it is a goroutine of this one. heal-open-*: for how long what is
//     denied got through.
//
//   - policy-change, own-policy-change: the calls that give a network, and a guest, another policy
//     of a hundred rules and a name while they are up, with one guest and with five hundred; a
//     tenth of a second between them.
//
//   - restore: the call of Machine.Start of a VM of a snapshot, 256 MiB with 64 MiB written to,
//     until it goes on; create-restored: the call of Host.Restore before; bare-restore: spawn of
//     Firecracker until it has loaded the same and resumed; fctools-restore: Vm::start of fctools
//     until it has done so, after Vm::prepare.
//
//   - fork: the same as restore for each of 50 VMs, eight at a time, as the host logs it;
//     fork-rate, bare-fork-rate, fctools-fork-rate: such VMs a second, from nothing; fork-private:
//     what each adds to the memory that no other process shares, the VMM's and this process's.
//
//   - fork-100: one call of Snapshot.Fork until the last of 100 such VMs goes on, eight at a time;
//     bare-fork-100: the same number of bare loads, as many at a time; fork-100/bare has no bar.
//
//   - ps-500: smartvm ps, the whole program, beside 500 VMs, the VMMs of 5 of which are stopped and
//     so do not answer; ps-500-all-answer: before they are stopped; open-500: the call of Open.
//     recover-200: the call of Host.Recover after 200 of those VMMs and the process that supervised
//     them were killed, beside the other 300.
//
//   - uffd-faults: times that a VM of a snapshot waited for its memory while it read 64 MiB, served
//     by smartvm, with what one before it had touched brought ahead; uffd-faults-none: that one.
//
// All but the loops, the images and the snapshots have one drive of 64 MiB, 8 MiB of them data, the
// rest a hole. Start gets a copy of its own, which create makes; the others use the file itself.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/lab"
	"push.rocks/smartvm/internal/tinyguest"
)

func main() {
	if len(os.Args) == 4 && os.Args[1] == phaseVerb {
		if err := runPhase(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(2)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	if len(os.Args) == 5 && os.Args[1] == superviseVerb {
		err := runSupervisor(ctx, os.Args[2], os.Args[3], os.Args[4])
		stop()
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(2)
		}
		return
	}
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

// bench is what a phase needs. Its process gets the exported fields.
type bench struct {
	Firecracker, Jailer, SmartVM, IPerf3 string // programs
	FCTools                              string // program, "" if it is left out
	Crun, Debian                         string // program and a root file system, a tar; "" if they are left out
	Dir, Disk                            string // for what the phase makes, on a tmpfs and on a disk
	Rounds                               int    // of every start measurement
	// how many times slower this machine is than one with nothing else to do
	Pace  float64
	Limit time.Duration // for the phase
	// what the file for a CPU profile begins with, if there is to be one
	Profile string

	idle, reboot string // kernels: one that prints mark and stays, one that reboots at once
	drive        string // 64 MiB, 8 MiB of them data
	samples      samples
}

func run(ctx context.Context) (ok bool, err error) {
	b := bench{}
	out := flag.String("out", "results.json", "`file` for the results")
	flag.IntVar(&b.Rounds, "n", defaultRounds, "rounds of every start measurement")
	cli := flag.String("smartvm", "../bin/smartvm", "the smartvm `program`")
	only := flag.String("only", "",
		"the `measurements` to make, of starts,loops,memory,snapshots,many,supervisor,command-line,staging,pulls,networks,guests")
	base := flag.String("runtime-dir", "/dev/shm", "existing `directory` to work below, on a tmpfs")
	profile := flag.String("cpuprofile", "", "what the `files` for CPU profiles begin with, one for each measurement")
	flag.Parse()
	if b.SmartVM, err = filepath.Abs(*cli); err != nil {
		return false, err
	}
	if *profile != "" {
		if b.Profile, err = filepath.Abs(*profile); err != nil {
			return false, err
		}
	}
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return false, err
	}
	cache.Messages = os.Stderr
	paths, err := cache.Ensure(ctx, fixtures.Firecracker, fixtures.Jailer, fixtures.IPerf3)
	if err != nil {
		return false, err
	}
	b.Firecracker, b.Jailer, b.IPerf3 = paths[0], paths[1], paths[2]
	mode, err := lab.Decide(lab.Mode(os.Getenv("SMARTVM_LAB")))
	if err != nil {
		return false, err
	}
	all := wanted(phases(mode.Lab), *only)
	b.peers(ctx, cache, all)
	r := runner{rounds: b.Rounds, report: newReport(ctx, b.Firecracker), paces: map[bool]float64{}}
	r.try = func(ctx context.Context, p phase, pace float64) ([]sample, error) {
		of := b
		of.Pace = pace
		return of.process(ctx, p, *base)
	}
	failed := r.measure(ctx, all)
	r.report.ratios()
	r.report.print(os.Stdout)
	missed := r.report.missed()
	if len(missed) > 0 {
		fmt.Fprintln(os.Stderr, "bench: missed:", strings.Join(missed, ", "))
	}
	return len(missed) == 0, errors.Join(failed, r.report.write(*out))
}

// peers finds what the phases compare smartvm with, as far as it can be missing. What cannot be had
// is left out.
func (b *bench) peers(ctx context.Context, cache fixtures.Cache, all []phase) {
	uses := func(name string) bool { return slices.ContainsFunc(all, func(p phase) bool { return p.name == name }) }
	if uses("starts") || uses("snapshots") {
		var err error
		if b.FCTools, err = buildFCTools(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "bench: fctools is left out:", err)
		}
	}
	if uses("command-line") {
		if err := b.findCrun(ctx, cache); err != nil {
			fmt.Fprintln(os.Stderr, "bench: crun is left out:", err)
		}
	}
}

func (b *bench) runtimeDir() string { return filepath.Join(b.Dir, "runtime") }
func (b *bench) cliDir() string     { return filepath.Join(b.Dir, "cli") }
func (b *bench) dataDir() string    { return filepath.Join(b.Dir, "data") }

// prepare makes what several phases need.
func (b *bench) prepare() error {
	b.samples.counting = true
	if err := os.MkdirAll(b.Dir, 0o700); err != nil { // the lab has a tmpfs of its own
		return err
	}
	for _, g := range []struct {
		path  *string
		guest tinyguest.Guest
	}{
		{&b.idle, tinyguest.Guest{Message: mark, Then: tinyguest.Idle}},
		{&b.reboot, tinyguest.Guest{Message: mark, Then: tinyguest.Reboot}},
	} {
		*g.path = filepath.Join(b.Dir, fmt.Sprintf("guest-%d", g.guest.Then))
		if err := os.WriteFile(*g.path, tinyguest.Image(g.guest), 0o644); err != nil {
			return err
		}
	}
	b.drive = filepath.Join(b.Dir, "drive")
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
