package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
)

// times is where a run's time went, and how its tests ended.
type times struct {
	begun time.Time

	mu      sync.Mutex
	labs    int
	failed  []string // what failed, in words
	phases  []phase
	results []result
	waited  time.Duration
}

type phase struct {
	name string
	took time.Duration
}

func newTimes() *times { return &times{begun: time.Now()} }

// add adds to a phase. Phases of different lanes overlap.
func (t *times) add(name string, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := slices.IndexFunc(t.phases, func(p phase) bool { return p.name == name })
	if i < 0 {
		i = len(t.phases)
		t.phases = append(t.phases, phase{name: name})
	}
	t.phases[i].took += took
}

func (t *times) fail(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failed = append(t.failed, fmt.Sprintf(format, args...))
}

func (t *times) passed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.failed) == 0
}

// take takes over what a watcher has seen. A test that runs again in another emulated host counts
// as it ended last.
func (t *times) take(w *watcher, lab bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.results {
		r.lab = lab
		t.results = slices.DeleteFunc(t.results, func(old result) bool {
			return old.pkg == r.pkg && old.test == r.test && old.lab == lab
		})
		t.results = append(t.results, r)
	}
	t.waited += w.waited
	if lab {
		t.labs++
	}
}

// shown is how many of the slowest tests are named.
const shown = 15

// print prints the table.
func (t *times) print(w io.Writer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintf(w, "\nWhere the time went (what runs beside each other counts twice):\n")
	for _, p := range append(t.phases, phase{"waiting for other packages' tests", t.waited},
		phase{"in all", time.Since(t.begun)}) {
		fmt.Fprintf(w, "  %7.1f s  %s\n", p.took.Seconds(), p.name)
	}
	if t.labs > 0 {
		fmt.Fprintf(w, "  %7d    labs\n", t.labs)
	}
	slices.SortFunc(t.results, func(a, b result) int { return cmp.Compare(b.took, a.took) })
	fmt.Fprintf(w, "The slowest tests:\n")
	for _, r := range t.results[:min(shown, len(t.results))] {
		fmt.Fprintf(w, "  %7.1f s  %s %s\n", r.took.Seconds(), place(r), r.test)
	}
	count := map[string]int{}
	for _, r := range t.results {
		if !t.elsewhere(r) {
			count[r.outcome]++
		}
	}
	for _, r := range t.results {
		if r.outcome == "SKIP" && !t.elsewhere(r) {
			fmt.Fprintf(w, "skipped: %s %s\n", place(r), r.test)
		}
	}
	for _, f := range t.failed {
		fmt.Fprintf(w, "FAIL: %s\n", f)
	}
	fmt.Fprintf(w, "%d passed, %d failed, %d skipped\n", count["PASS"], count["FAIL"], count["SKIP"])
}

func place(r result) string {
	if r.lab {
		return r.pkg + " (lab)"
	}
	return r.pkg
}

// elsewhere says whether a test was skipped only because it ran in an emulated host, or the other
// way round.
func (t *times) elsewhere(r result) bool {
	return r.outcome == "SKIP" &&
		(strings.HasPrefix(r.test, "TestPrepareLab") || !r.lab && strings.HasPrefix(r.test, "TestLinux") &&
			slices.ContainsFunc(t.results, func(o result) bool { return o.lab && o.pkg == r.pkg && o.test == r.test }))
}
