package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Change is what people say of what an image runs. The zero value changes nothing.
type Change struct {
	// Entrypoint and Cmd are as in a Dockerfile: a JSON array of strings, or a line for /bin/sh -c;
	// empty: none. Nil: as it is. A new entrypoint takes the command away that was there.
	Entrypoint, Cmd *string
	Env             []string // NAME=VALUE, in place of what has the name
	User            string   // NAME or UID, with :GROUP; empty: as it is
	WorkingDir      string   // absolute; empty: as it is
}

const (
	maxChange = 128 << 10 // bytes of arguments and environment, as of a VM's
	maxText   = 4096      // of a user or a directory
)

// Apply returns what c becomes, which shares nothing with it that is changed.
func (ch Change) Apply(c Config) (Config, error) {
	var errs []error
	for _, line := range []struct {
		what string
		text *string
		args *[]string
	}{{"entrypoint", ch.Entrypoint, &c.Entrypoint}, {"cmd", ch.Cmd, &c.Cmd}} {
		if line.text == nil {
			continue
		}
		args, err := arguments(*line.text)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", line.what, err))
		}
		if *line.args = args; line.what == "entrypoint" {
			c.Cmd = nil
		}
	}
	c.Env = slices.Clone(c.Env)
	for n, v := range ch.Env {
		name, _, ok := strings.Cut(v, "=")
		if !ok || name == "" {
			errs = append(errs, fmt.Errorf("env: variable %d: want NAME=VALUE", n+1)) // without its value, which may be secret
			continue
		}
		c.Env = slices.DeleteFunc(c.Env, func(old string) bool { return strings.HasPrefix(old, name+"=") })
		c.Env = append(c.Env, v)
	}
	if ch.User != "" {
		c.User = ch.User
	}
	if ch.WorkingDir != "" {
		c.WorkingDir = ch.WorkingDir
		if ch.WorkingDir[0] != '/' {
			errs = append(errs, fmt.Errorf("working directory %.200q: must be absolute", ch.WorkingDir))
		}
	}
	total := 0
	for what, texts := range map[string][]string{"entrypoint": c.Entrypoint, "cmd": c.Cmd, "env": c.Env} {
		for _, text := range texts {
			if total += len(text) + 1; strings.Contains(text, "\x00") || !utf8.ValidString(text) {
				errs = append(errs, fmt.Errorf("%s: it is no text", what))
			}
		}
	}
	for what, text := range map[string]string{"user": c.User, "working directory": c.WorkingDir} {
		if len(text) > maxText || strings.ContainsAny(text, "\x00\n") || !utf8.ValidString(text) {
			errs = append(errs, fmt.Errorf("%s: want one line of at most %d bytes", what, maxText))
		}
	}
	if total > maxChange {
		errs = append(errs, fmt.Errorf("entrypoint, cmd and env have more than %d bytes", maxChange))
	}
	return c, errors.Join(errs...)
}

// arguments reads what a Dockerfile has after CMD or ENTRYPOINT.
func arguments(text string) ([]string, error) {
	text = strings.TrimSpace(text)
	if text == "" {
		return nil, nil
	}
	if text[0] != '[' {
		return []string{"/bin/sh", "-c", text}, nil
	}
	var args []string
	if err := json.Unmarshal([]byte(text), &args); err != nil {
		return nil, fmt.Errorf("want a JSON array of strings, such as [\"/bin/app\", \"-v\"]: %w", err)
	}
	return args, nil
}
