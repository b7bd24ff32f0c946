package config_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image/oci/config"
)

func TestChange(t *testing.T) {
	was := func() config.Config {
		return config.Config{
			Entrypoint: []string{"/e"}, Cmd: []string{"c"}, Env: []string{"A=1", "AB=2"}, User: "u",
			WorkingDir: "/w", Labels: map[string]string{"l": "v"},
		}
	}
	for name, c := range map[string]struct {
		change config.Change
		want   func(c *config.Config)
	}{
		"nothing": {config.Change{}, func(*config.Config) {}},
		"cmd": {config.Change{Cmd: new(`["a", "b c"]`)}, func(c *config.Config) {
			c.Cmd = []string{"a", "b c"}
		}},
		"a line": {config.Change{Cmd: new(" a | b ")}, func(c *config.Config) {
			c.Cmd = []string{"/bin/sh", "-c", "a | b"}
		}},
		"no cmd": {config.Change{Cmd: new("")}, func(c *config.Config) { c.Cmd = nil }},
		"an entrypoint takes the command away": {config.Change{Entrypoint: new(`["/f"]`)}, func(c *config.Config) {
			c.Entrypoint, c.Cmd = []string{"/f"}, nil
		}},
		"both": {config.Change{Entrypoint: new(`["/f"]`), Cmd: new(`["x"]`)}, func(c *config.Config) {
			c.Entrypoint, c.Cmd = []string{"/f"}, []string{"x"}
		}},
		"env": {config.Change{Env: []string{"A=", "C=x=y"}}, func(c *config.Config) {
			c.Env = []string{"AB=2", "A=", "C=x=y"}
		}},
		"user": {config.Change{User: "1:g", WorkingDir: "/x"}, func(c *config.Config) { c.User, c.WorkingDir = "1:g", "/x" }},
	} {
		base, want := was(), was()
		c.want(&want)
		got, err := c.change.Apply(base)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
		if diff := cmp.Diff(was(), base); diff != "" {
			t.Errorf("%s: the old one has changed:\n%s", name, diff)
		}
	}
}

func TestChange_Refused(t *testing.T) {
	for want, c := range map[string]config.Change{
		"cmd: want a JSON array":             {Cmd: new("[a]")},
		"entrypoint: want a JSON array":      {Entrypoint: new(`["a", 1]`)},
		"env: variable 2: want NAME=VALUE":   {Env: []string{"A=b", "secret"}},
		"env: variable 1: want NAME=VALUE":   {Env: []string{"=secret"}},
		"working directory \"x\": must be":   {WorkingDir: "x"},
		"cmd: it is no text":                 {Cmd: new(`["a\u0000"]`)},
		"user: want one line":                {User: "a\nb"},
		"env: it is no text":                 {Env: []string{"A=\xff"}},
		"working directory: want one line":   {WorkingDir: "/" + strings.Repeat("x", 5000)},
		"cmd and env have more than 131072 ": {Env: []string{"A=" + strings.Repeat("x", 131072)}},
	} {
		if _, err := c.Apply(config.Config{}); err == nil || !strings.Contains(err.Error(), want) ||
			strings.Contains(err.Error(), "secret") {
			t.Errorf("%.100v: %v, want %s", c, err, want)
		}
	}
}
