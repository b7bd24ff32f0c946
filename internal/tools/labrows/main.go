// Command labrows measures variants of the lab (see internal/lab) side by side: what they and the
// guests in them take until they are ready, and how many stop. After each round it prints a row for
// each variant.
//
//	labrows [-labs n] [-guests n] [-deadline d] [-qemu name=program]... variant...
//
// A round is one lab of each variant, so that what else the machine does meets all alike; a lab
// boots its guests one after another. A variant is settings, separated by spaces, or "default":
//
//	qemu=NAME        a QEMU that -qemu names
//	cpus=N           of the lab
//	memory=MIB       of the lab
//	accel=WORD       QEMU's -accel
//	cpu=WORD         QEMU's -cpu
//	kernel=ARG       an argument of the lab's kernel; may be repeated, as the next four
//	kvm_amd=OPTION   of the module
//	sys=MODULE/PARAMETER=VALUE
//	guest=ARG        an argument of the guest's kernel
//	device=NAME      vsock, rng or balloon, with its drivers; the VMM takes a balloon with pages=none only
//	no-serial        the guest's kernel has no serial line, so the guest counts as up when it has ended
//	guest-memory=MIB
//	pages=SIZE       of the lab's memory, for guests: 2M, or none for ordinary ones
//
// A guest that dies, or is not up and gone by its deadline, is a stop. So is a lab that does not
// boot, dies, or says nothing for a guest's deadline and 15 s. It is ended, and the next begun.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if len(os.Args) == 7 && os.Args[1] == insideVerb {
		err = inside(os.Args[2:])
	} else {
		err = run(ctx, os.Args[1:])
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "labrows:", err)
		os.Exit(1)
	}
}

// row is what was measured of a variant.
type row struct {
	variant
	name         string    // as on the command line
	ready, up    []float64 // seconds of labs and of guests
	cpu          float64   // seconds that QEMU computed while guests were booted
	labs, guests int
	labStops     int
	guestStops   int
}

// measurement is what all variants share.
type measurement struct {
	dir                   string // for what labs read
	config                lab.Config
	qemus                 map[string]string
	vmm, vmlinux, modules string
	guests                int // in each lab
	deadline              time.Duration
}

func run(ctx context.Context, args []string) (err error) {
	flags := flag.NewFlagSet("labrows", flag.ContinueOnError)
	labs := flags.Int("labs", 5, "labs of each variant")
	m := &measurement{qemus: map[string]string{}}
	flags.IntVar(&m.guests, "guests", 6, "guests in each lab")
	flags.DurationVar(&m.deadline, "deadline", 45*time.Second, "a guest's")
	flags.Func("qemu", "`name=program`; may be repeated", func(s string) error {
		name, program, _ := strings.Cut(s, "=")
		m.qemus[name] = program
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	var rows []*row
	for _, text := range flags.Args() {
		v, err := parseVariant(text)
		if err != nil {
			return err
		}
		rows = append(rows, &row{name: text, variant: v})
	}
	if m.dir, err = os.MkdirTemp("", "smartvm-labrows-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(m.dir)) }()
	if err := m.find(ctx); err != nil {
		return err
	}
	for range *labs {
		for _, r := range rows {
			if err := m.lab(ctx, r); err != nil {
				return errors.Join(fmt.Errorf("variant %q: %w", r.name, err), printRows(os.Stdout, rows))
			}
		}
		if err := printRows(os.Stdout, rows); err != nil {
			return err
		}
	}
	return nil
}

// find gets what labs and guests need.
func (m *measurement) find(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return err
	}
	cache.Messages = os.Stderr
	if m.config, err = cache.Lab(ctx); err != nil {
		return err
	}
	paths, err := cache.Ensure(ctx, fixtures.Firecracker, fixtures.GuestKernel, fixtures.GuestModules)
	if err != nil {
		return err
	}
	m.qemus[""], m.vmm, m.vmlinux, m.modules = m.config.QEMU, paths[0], paths[1], paths[2]
	m.config.Dir, m.config.Command = "/", []string{self, insideVerb}
	m.config.Env, m.config.Stderr = []string{"PATH=" + os.Getenv("PATH")}, os.Stderr
	return nil
}

// lab runs a lab of the row's variant. It returns an error when measuring must end.
func (m *measurement) lab(ctx context.Context, r *row) error {
	c := m.config
	pidFile, initrd, machine := filepath.Join(m.dir, "pid"), filepath.Join(m.dir, "initrd"),
		filepath.Join(m.dir, "vm.json")
	c.QEMU = filepath.Join(m.dir, "qemu")
	qemu := m.qemus[r.last("qemu", "")]
	if qemu == "" {
		return fmt.Errorf("no -qemu %s=program", r.last("qemu", ""))
	}
	var errs [2]error
	c.CPUs, errs[0] = r.number("cpus", lab.DefaultCPUs)
	c.MemoryMiB, errs[1] = r.number("memory", lab.DefaultMemoryMiB)
	if err := errors.Join(
		errs[0], errs[1],
		os.WriteFile(c.QEMU, r.wrapper(qemu, pidFile), 0o755),
		r.initramfs(initrd, m.modules, c.Busybox),
		r.machine(machine, m.vmlinux, initrd, lab.LargePages),
	); err != nil {
		return err
	}
	c.Command = append(slices.Clone(c.Command), r.name, strconv.Itoa(m.guests), m.deadline.String(), m.vmm, machine)
	silence := m.deadline + 15*time.Second
	limited, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := time.AfterFunc(silence, func() { cancel(fmt.Errorf("it has said nothing for %v", silence)) })
	defer quiet.Stop()
	out, w := io.Pipe()
	c.Stdout = w
	begun := time.Now()
	go func() {
		status, err := lab.Run(limited, c)
		if err == nil && status != 0 {
			err = fmt.Errorf("exit status %d", status)
		}
		_ = w.CloseWithError(err)
	}()
	r.labs++
	lines := bufio.NewScanner(out)
	for cpu := -1.0; lines.Scan(); {
		quiet.Reset(silence)
		var g guest
		if err := json.Unmarshal(lines.Bytes(), &g); err != nil {
			return errors.Join(fmt.Errorf("%q: %w", lines.Text(), err), out.Close())
		}
		before := cpu
		if cpu = cpuSeconds(pidFile); before < 0 {
			r.ready = append(r.ready, time.Since(begun).Seconds())
			continue
		}
		r.cpu += cpu - before
		r.take(g)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := lines.Err(); err != nil {
		r.labStops++
		fmt.Fprintf(os.Stderr, "%s: lab %d: %v\n", r.name, r.labs, err)
	}
	return nil
}

// take counts a guest.
func (r *row) take(g guest) {
	r.guests++
	if g.Stop == "" {
		r.up = append(r.up, g.Seconds)
		return
	}
	r.guestStops++
	fmt.Fprintf(os.Stderr, "%s: lab %d: guest %d: %s\n", r.name, r.labs, r.guests, g.Stop)
}

// cpuSeconds returns what the process whose ID is in a file has computed.
func cpuSeconds(pidFile string) float64 {
	pid, _ := os.ReadFile(pidFile)
	stat, _ := os.ReadFile(filepath.Join("/proc", strings.TrimSpace(string(pid)), "stat"))
	// After the name, which may have spaces, user and system time are the 12th and 13th field, in
	// 1/100 s.
	_, rest, _ := strings.Cut(string(stat), ") ")
	var user, system float64
	if f := strings.Fields(rest); len(f) > 12 {
		user, _ = strconv.ParseFloat(f[11], 64)
		system, _ = strconv.ParseFloat(f[12], 64)
	}
	return (user + system) / 100
}

// printRows prints the rows as a table.
func printRows(w io.Writer, rows []*row) error {
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Fprintf(w, "\nAt %s, with the machine's load at %s:\n\n", time.Now().Format(time.TimeOnly),
		strings.Join(strings.Fields(string(load))[:3], " "))
	t := tabwriter.NewWriter(w, 0, 0, 1, ' ', 0)
	fmt.Fprintln(t, "| variant\t| labs\t| ready, s\t| max\t| stops\t| guests\t| up, s\t| max\t| stops\t| CPU, s\t|")
	fmt.Fprintln(t, "|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, r := range rows {
		fmt.Fprintf(t, "| %s\t| %d\t| %s\t| %d\t| %d\t| %s\t| %d\t| %.1f\t|\n",
			r.name, r.labs, spread(r.ready), r.labStops, r.guests, spread(r.up), r.guestStops, r.cpu/float64(max(1, r.guests)))
	}
	return t.Flush()
}

// spread formats the median and the maximum.
func spread(values []float64) string {
	if len(values) == 0 {
		return "-\t| -"
	}
	slices.Sort(values)
	return fmt.Sprintf("%.1f\t| %.1f", values[len(values)/2], values[len(values)-1])
}
