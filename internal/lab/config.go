package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// maxShares is bounded by the PCI slots of the emulated machine.
const maxShares = 8

// withDefaults returns a checked copy in which every field is set and
// Command[0] is an absolute path.
func (c Config) withDefaults() (Config, error) {
	invalid := func(format string, args ...any) (Config, error) {
		return Config{}, fmt.Errorf("%w: %s", ErrConfig, fmt.Sprintf(format, args...))
	}
	for name, path := range map[string]*string{
		"kernel": &c.Kernel, "modules": &c.Modules, "busybox": &c.Busybox,
		"QEMU": &c.QEMU,
	} {
		abs, err := filepath.Abs(*path)
		if *path == "" || err != nil {
			return invalid("no %s", name)
		}
		*path = abs
	}
	if c.MemoryMiB == 0 {
		c.MemoryMiB = DefaultMemoryMiB
	}
	if c.CPUs == 0 {
		c.CPUs = DefaultCPUs
	}
	if len(c.Command) == 0 {
		return invalid("no command")
	}
	if !filepath.IsAbs(c.Dir) {
		return invalid("directory %q is not absolute", c.Dir)
	}
	if len(c.Share) > maxShares {
		return invalid("%d shares, at most %d", len(c.Share), maxShares)
	}
	for _, dir := range c.Share {
		// The mount tag and QEMU's options are separated by commas.
		if !filepath.IsAbs(dir) || strings.ContainsAny(dir, ",\x00") {
			return invalid("cannot share %q", dir)
		}
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			return invalid("cannot share %q: not a directory", dir)
		}
	}
	for _, s := range append(append([]string{c.Dir}, c.Command...), c.Env...) {
		if strings.Contains(s, "\x00") {
			return invalid("NUL in %q", s)
		}
	}
	env := make([]string, 0, len(c.Env)+1)
	for _, e := range c.Env {
		name, _, ok := strings.Cut(e, "=")
		if !ok || name == "" {
			return invalid("environment %q", e)
		}
		if name != InLabVariable {
			env = append(env, e)
		}
	}
	c.Env = append(env, InLabVariable+"=1")
	program, err := c.find(c.Command[0])
	if err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	c.Command = append([]string{program}, c.Command[1:]...)
	return c, nil
}

// find resolves a program as a shell with the command's environment would.
func (c Config) find(name string) (string, error) {
	if filepath.IsAbs(name) {
		return name, nil
	}
	if strings.Contains(name, "/") {
		return filepath.Join(c.Dir, name), nil
	}
	for _, e := range c.Env {
		list, ok := strings.CutPrefix(e, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(list) {
			path := filepath.Join(dir, name)
			if info, err := os.Stat(path); err == nil && filepath.IsAbs(path) && info.Mode().IsRegular() &&
				info.Mode()&0o111 != 0 {
				return path, nil
			}
		}
	}
	return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
}
