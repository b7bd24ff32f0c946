package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

func TestReport_Bars(t *testing.T) {
	r := newReport(t.Context(), "")
	r.take([]sample{
		{"cli-run", "ms", 60}, {"crun-run", "ms", 10}, // no bar
		{"start", "ms", 30}, {"bare", "ms", 10}, // misses its bar
	}, false)
	r.ratios()
	if got := r.missed(); !slices.Contains(got, "start/bare") || slices.Contains(got, "run/crun") {
		t.Errorf("missed: %v, want start/bare and not run/crun, which has no bar", got)
	}
	var out bytes.Buffer
	r.print(&out)
	for line := range strings.Lines(out.String()) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == "run/crun" {
			if !slices.Equal(f, []string{"run/crun", "6.00"}) {
				t.Errorf("the line of a ratio without a bar is %q", line)
			}
			return
		}
	}
	t.Errorf("the report lacks run/crun:\n%s", &out)
}
