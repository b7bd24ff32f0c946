package main

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"

	"push.rocks/smartvm/internal/cli"
)

// The help of each command fits into a terminal of 80 columns.
func TestHelp_Width(t *testing.T) {
	seen := 0
	var show func(command ...string)
	show = func(command ...string) {
		var stdout, stderr bytes.Buffer
		code := cli.Main(t.Context(), append(command, "--help"), cli.Process{Stdout: &stdout, Stderr: &stderr})
		if code != 0 || stderr.Len() > 0 {
			t.Fatalf("%q: %d, %s", command, code, &stderr)
		}
		seen++
		commands := false
		for line := range strings.Lines(stdout.String()) {
			line = strings.TrimSuffix(line, "\n")
			if utf8.RuneCountInString(line) > 80 {
				t.Errorf("%q: %s", command, line)
			}
			name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
			if line == "" || line == "Commands:" {
				commands = line != ""
			} else if commands && name != "completion" { // that is cobra's
				show(append(command[:len(command):len(command)], name)...)
			}
		}
	}
	show()
	if seen < 60 {
		t.Errorf("%d commands", seen)
	}
}
