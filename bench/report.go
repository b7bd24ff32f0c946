package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/vmm"
)

type row struct {
	Name string  `json:"name"`
	N    int     `json:"n"`
	P50  float64 `json:"p50"`
	P95  float64 `json:"p95"`
	Unit string  `json:"unit"`
	Lab  bool    `json:"lab,omitempty"` // measured in the lab
}

type ratio struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Bar   float64 `json:"bar"`
	Op    string  `json:"op"` // "<=" or ">="; "" if there is no bar
	OK    bool    `json:"ok"`
	Lab   bool    `json:"lab,omitempty"`   // measured in the lab
	First float64 `json:"first,omitempty"` // missed the bar, so that it was measured again
}

// stop is a phase that has ended without its measurements.
type stop struct {
	Phase   string  `json:"phase"`
	Seconds float64 `json:"seconds"` // from its start
	Try     int     `json:"try"`
	Reason  string  `json:"reason"`
}

func (s stop) String() string {
	return fmt.Sprintf("%s stopped after %.0f s (try %d of %d): %s", s.Phase, s.Seconds, s.Try, tries, s.Reason)
}

// report collects samples and makes rows and ratios of them.
type report struct {
	Machine map[string]any `json:"machine"`
	Rows    []row          `json:"rows"`
	Ratios  []ratio        `json:"ratios"`
	Stops   []stop         `json:"stops,omitempty"`

	order   []string
	samples map[string][]float64
	units   map[string]string
	lab     map[string]bool    // measured in the lab
	first   map[string]float64 // ratios that missed their bar and were measured again
}

func newReport(ctx context.Context, firecracker string) *report {
	version, _ := vmm.Version(ctx, firecracker)
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	kvm := "kvm"
	if _, err := os.Stat("/sys/module/kvm_pvm"); err == nil {
		kvm = "pvm"
	}
	load := load()
	if busy, _ := strconv.ParseFloat(load, 64); busy > float64(runtime.NumCPU())/2 {
		fmt.Fprintf(os.Stderr,
			"bench: this machine is busy (load %s): what hands over between processes more often suffers more\n", load)
	}
	return &report{
		Machine: map[string]any{
			"cpu": field("/proc/cpuinfo", "model name"), "cpus": runtime.NumCPU(), "memory": field("/proc/meminfo", "MemTotal"),
			"kernel": strings.TrimSpace(string(kernel)), "kvm": kvm, "firecracker": version.String(),
			"go": runtime.Version(), "load": load, "date": time.Now().UTC().Format(time.DateOnly),
		},
		samples: map[string][]float64{}, units: map[string]string{}, lab: map[string]bool{}, first: map[string]float64{},
	}
}

// load is how many processes wanted a CPU, averaged over the last minute.
func load() string {
	data, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(data), " ")
	return first
}

// field is the value of the first "name : value" line of a file.
func field(path, name string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if key, value, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// sample is one measured value.
type sample struct {
	Name, Unit string
	Value      float64
}

// samples are what a phase measures.
type samples struct {
	counting bool
	all      []sample
}

func (s *samples) time(name string, d time.Duration) {
	s.add(name, "ms", float64(d.Microseconds())/1000)
}

func (s *samples) add(name, unit string, value float64) {
	if s.counting {
		s.all = append(s.all, sample{name, unit, value})
	}
}

// take adds what a phase has measured, and returns the ratios that miss their bar by it.
func (r *report) take(all []sample, lab bool) (missed []ratio) {
	before := r.compute()
	for _, s := range all {
		if r.samples[s.Name] == nil {
			r.order = append(r.order, s.Name)
			r.units[s.Name] = s.Unit
			r.lab[s.Name] = lab
		}
		r.samples[s.Name] = append(r.samples[s.Name], s.Value)
	}
	for _, x := range r.compute() {
		if !x.OK && !slices.ContainsFunc(before, func(b ratio) bool { return b.Name == x.Name }) {
			missed = append(missed, x)
		}
	}
	return missed
}

// takeAgain replaces what a phase had measured when these ratios missed their bar.
func (r *report) takeAgain(all []sample, lab bool, missed []ratio) {
	for _, x := range missed {
		r.first[x.Name] = x.Value
	}
	for _, s := range all {
		r.samples[s.Name] = r.samples[s.Name][:0]
	}
	r.take(all, lab)
}

// missing names the phases that were not measured.
func (r *report) missing() (names []string) {
	for _, s := range r.Stops {
		if s.Try == tries {
			names = append(names, s.Phase)
		}
	}
	return names
}

// quantile q of a measurement, by the nearest rank.
func (r *report) quantile(name string, q float64) float64 {
	s := slices.Sorted(slices.Values(r.samples[name]))
	if len(s) == 0 {
		return math.NaN()
	}
	return s[min(int(q*float64(len(s))), len(s)-1)]
}

func (r *report) p50(name string) float64 { return r.quantile(name, 0.50) }
func (r *report) p95(name string) float64 { return r.quantile(name, 0.95) }

// ratios fills in rows and ratios.
func (r *report) ratios() {
	for _, name := range r.order {
		if r.units[name] == "" { // a ratio's own samples
			continue
		}
		r.Rows = append(r.Rows, row{name, len(r.samples[name]), r.p50(name), r.p95(name), r.units[name], r.lab[name]})
	}
	r.Ratios = r.compute()
}

// compute returns the ratios of what was measured.
func (r *report) compute() (all []ratio) {
	for _, x := range []ratio{
		{Name: "start/bare", Value: r.p50("start") / r.p50("bare"), Op: "<=", Bar: 1.2},
		{Name: "start-jailed/bare", Value: r.p50("start-jailed") / r.p50("bare"), Op: "<=", Bar: 1.6},
		{Name: "start/go-sdk", Value: r.p50("start") / r.p50("go-sdk"), Op: "<=", Bar: 0.65},
		{Name: "start/fctools", Value: r.p50("start") / r.p50("fctools"), Op: "<=", Bar: 1},
		{Name: "start-p95/bare", Value: r.p95("start") / r.p95("bare"), Op: "<=", Bar: 1.5},
		{Name: "loop-rate/bare", Value: r.p50("loop/bare-loop"), Op: ">=", Bar: 0.85},
		{Name: "memory-per-vm-kib", Value: r.p50("memory-per-vm"), Op: "<=", Bar: 150},
		{Name: "supervise-memory-mib", Value: r.p50("supervise-memory"), Op: "<=", Bar: 6},
		{Name: "cli-run-overhead-ms", Value: r.p50("cli-run") - r.p50("bare-run"), Op: "<=", Bar: 40},
		{Name: "run/crun", Value: r.p50("cli-run") / r.p50("crun-run")},
		{Name: "stage-ms", Value: r.p50("stage"), Op: "<=", Bar: 5},
		{Name: "stage-bytes-copied", Value: r.p50("stage-copied"), Op: "<=", Bar: 0},
		{Name: "20-vms-of-image-percent", Value: r.p50("20-vms-of-image"), Op: "<=", Bar: 1},
		{Name: "oci-rate/tar", Value: r.p50("pull/tar"), Op: ">=", Bar: 1.3},
		{Name: "oci-memory-mib", Value: r.p95("pull-memory"), Op: "<=", Bar: 100},
		{Name: "warm-slot-ms", Value: r.p50("warm-slot"), Op: "<=", Bar: 1},
		{Name: "cold-tap-ms", Value: r.p50("cold-tap-1"), Op: "<=", Bar: 2},
		{Name: "start-net-500/1", Value: r.p50("start-net-500") / r.p50("start-net-1"), Op: "<=", Bar: 1.2},
		{Name: "cold-rules-500/1", Value: r.p50("cold-rules-500") / r.p50("cold-rules-1"), Op: "<=", Bar: 1.2},
		{Name: "rules-500/1", Value: r.p50("round-trip-500") / r.p50("round-trip-1"), Op: "<=", Bar: 1.2},
		{Name: "teardown-100/1", Value: r.p50("teardown-100") / r.p50("teardown-1"), Op: "<=", Bar: 10},
		{Name: "dns/direct", Value: max(r.p50("dns-new"), r.p50("dns-again")) / r.p50("dns-direct"), Op: "<=", Bar: 1.5},
		{Name: "policy-change-ms", Value: max(r.p50("policy-change-500"), r.p50("own-policy-change-500")), Op: "<=", Bar: 50},
		{Name: "heal-ms", Value: r.p50("heal-1"), Op: "<=", Bar: 100},
		// What else the machine does only takes away from a rate: the best are compared.
		{Name: "throughput/no-rules", Value: r.p95("throughput") / r.p95("throughput-no-rules"), Op: ">=", Bar: 0.95},
		{
			Name: "exec/connect", Lab: r.lab["guest-exec"],
			Value: r.p50("guest-exec") / (r.p50("guest-connect") + r.p50("guest-spawn")), Op: "<=", Bar: 1.3,
		},
		{
			Name: "cp-rate/stream", Lab: r.lab["guest-copy-to"],
			Value: min(r.p50("guest-copy-to")/r.p50("guest-stream-to"), r.p50("guest-copy-from")/r.p50("guest-stream-from")),
			Op:    ">=", Bar: 0.7,
		},
		{Name: "agent-boot-share-percent", Lab: r.lab["guest-kernel"], Value: r.p50("agent-boot/kernel"), Op: "<=", Bar: 10},
		{Name: "agent-rss-mib", Lab: r.lab["agent-rss"], Value: r.p50("agent-rss"), Op: "<=", Bar: 6},
		{Name: "restore/bare", Value: r.p50("restore") / r.p50("bare-restore"), Op: "<=", Bar: 1.25},
		{Name: "restore/fctools", Value: r.p50("restore") / r.p50("fctools-restore"), Op: "<=", Bar: 1},
		{Name: "fork-p99/p50", Value: r.quantile("fork", 0.99) / r.p50("fork"), Op: "<=", Bar: 2},
		{Name: "fork-rate/bare", Value: r.p50("fork-rate/bare"), Op: ">=", Bar: 0.85},
		{Name: "fork-rate/fctools", Value: r.p50("fork-rate/fctools"), Op: ">=", Bar: 1},
		{Name: "uffd-faults/none", Value: r.p50("uffd-faults") / r.p50("uffd-faults-none"), Op: "<=", Bar: 0.1},
		{Name: "ps-500-ms", Value: r.p50("ps-500"), Op: "<=", Bar: 1500},
		{Name: "open-500-ms", Value: r.p50("open-500"), Op: "<=", Bar: 100},
		{Name: "recover-200-s", Value: r.p50("recover-200"), Op: "<=", Bar: 5},
		{Name: "fork-private-mib", Value: r.p50("fork-private"), Op: "<=", Bar: 3},
	} {
		if math.IsNaN(x.Value) {
			continue // not measured
		}
		x.OK = x.Op == "" || x.Op == "<=" && x.Value <= x.Bar || x.Op == ">=" && x.Value >= x.Bar
		x.First = r.first[x.Name]
		all = append(all, x)
	}
	return all
}

// missed names the ratios that miss their bar.
func (r *report) missed() (names []string) {
	for _, x := range r.Ratios {
		if !x.OK {
			names = append(names, x.Name)
		}
	}
	return names
}

func (r *report) print(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "measurement\tn\tp50\tp95\tunit\t")
	for _, x := range r.Rows {
		fmt.Fprintf(t, "%s\t%d\t%.2f\t%.2f\t%s\t\n", marked(x.Name, x.Lab), x.N, x.P50, x.P95, x.Unit)
	}
	fmt.Fprintln(t, "\t\t\t\t\t\nratio\tvalue\t\tbar\t\t")
	for _, x := range r.Ratios {
		if x.Op == "" {
			fmt.Fprintf(t, "%s\t%.2f\t\t\t\t\n", marked(x.Name, x.Lab), x.Value)
			continue
		}
		verdict := "ok"
		if !x.OK {
			verdict = "MISSED"
		}
		if x.First != 0 {
			verdict += fmt.Sprintf(", %.2f at first", x.First)
		}
		fmt.Fprintf(t, "%s\t%.2f\t%s\t%g\t%s\t\n", marked(x.Name, x.Lab), x.Value, x.Op, x.Bar, verdict)
	}
	_ = t.Flush()
	for _, x := range r.Stops {
		first, _, _ := strings.Cut(x.String(), "\n") // without consoles
		fmt.Fprintln(w, first)
	}
}

// marked is a name, with where it was measured.
func marked(name string, lab bool) string {
	if lab {
		return name + " (lab)"
	}
	return name
}

func (r *report) write(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(path, append(data, '\n'), 0o644)
}
