package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"push.rocks/smartvm/internal/depmod"
)

const (
	maxAlias   = 4 << 10  // bytes of one, or of what else a module says
	maxAliases = 64 << 20 // bytes of all
)

// makeLists returns the lists that depmod makes of tree, by name, for modprobe
// to read. Of several modules of a name one in updates counts most. Modules that
// make no sense are left out, as depmod does.
func makeLists(tree fs.FS, files []string) (map[string][]byte, error) {
	rank := map[string]uint32{}
	order, err := readFile(tree, "modules.order", maxModuleList)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for line := range strings.Lines(string(order)) {
		rank[moduleName(strings.TrimSpace(line))] = uint32(len(rank))
	}
	files = slices.Clone(files)
	slices.SortStableFunc(files, func(a, b string) int {
		older := func(file string) int { return len(strings.TrimPrefix(file, "updates/")) - len(file) }
		return cmp.Compare(older(a), older(b))
	})
	all, left := map[string]*depmod.Module{}, maxAliases
	for _, file := range files {
		name := moduleName(file)
		if all[name] != nil || !printable(file) {
			continue
		}
		m, err := readFacts(tree, file)
		if errors.Is(err, ErrCorrupt) || errors.As(err, new(*CompressionError)) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var listed bool
		if m.Rank, listed = rank[name]; !listed {
			m.Rank = uint32(len(rank))
		}
		for _, a := range m.Aliases {
			left -= len(a) + len(name)
		}
		if left < 0 {
			return nil, fmt.Errorf("more than %d bytes of aliases: %w", maxAliases, ErrTooLarge)
		}
		all[name] = m
	}
	builtin, err := readBuiltin(tree)
	if err != nil {
		return nil, err
	}
	lists, err := depmod.Lists(all, builtin)
	if errors.Is(err, depmod.ErrTooLarge) {
		err = fmt.Errorf("%w: %w", ErrTooLarge, err)
	}
	return lists, err
}

// readBuiltin returns the names of what the kernel has built in, with their
// aliases, which the kernel's build writes down as NAME.FIELD=VALUE.
func readBuiltin(tree fs.FS) (map[string][]string, error) {
	names, err := readFile(tree, "modules.builtin", maxModuleList)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	info, err := readFile(tree, "modules.builtin.modinfo", maxModuleList)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	all := map[string][]string{}
	for line := range strings.Lines(string(names)) {
		if line = strings.TrimSpace(line); line != "" {
			all[moduleName(line)] = nil
		}
	}
	for field := range strings.SplitSeq(string(info), "\x00") {
		name, value, _ := strings.Cut(field, ".alias=")
		if name = moduleName(name); value != "" && len(value) <= maxAlias && printable(name+value) {
			all[name] = append(all[name], value)
		}
	}
	return all, nil
}

// printable says whether a text is ASCII without spaces.
func printable(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
}

func readFacts(tree fs.FS, file string) (*depmod.Module, error) {
	m := &depmod.Module{File: file}
	data, err := readFile(tree, file, maxModule)
	if err == nil {
		data, err = unpackModule(file, data)
	}
	var fields []string
	if err == nil {
		fields, err = modinfo(data)
	}
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", file, err)
	}
	for _, field := range fields {
		name, value, _ := strings.Cut(field, "=")
		switch {
		case value == "" || len(value) > maxAlias:
		case name == "depends":
			for d := range strings.SplitSeq(value, ",") {
				m.Depends = append(m.Depends, moduleName(d))
			}
		case name == "alias" && printable(value):
			m.Aliases = append(m.Aliases, value)
		case name == "softdep" && !strings.ContainsAny(value, "\n\\"):
			m.Softdeps = append(m.Softdeps, value)
		}
	}
	return m, nil
}
