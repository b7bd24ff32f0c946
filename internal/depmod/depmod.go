// Package depmod makes the lists of kernel modules that modprobe reads, of kmod and of busybox, as
// depmod(8) does.
package depmod

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// ErrTooLarge says that modules depend on too many others.
var ErrTooLarge = errors.New("too many dependencies of modules")

const maxDependencies = 16 << 20 // bytes of modules.dep

// Module is what a kernel module says of itself that modprobe wants to know. Names have underscores
// for hyphens.
type Module struct {
	File     string   // relative to /lib/modules/RELEASE
	Depends  []string // names
	Aliases  []string // printable ASCII without spaces
	Softdeps []string // as in the module: "pre: NAME..."
	Rank     uint32   // of modules with one alias the lower one counts first
}

// Lists returns the files that modprobe reads, by name: of all modules by their names, and of those
// that the kernel has built in, with their aliases. Returns ErrTooLarge.
func Lists(all map[string]*Module, builtin map[string][]string) (map[string][]byte, error) {
	var dep, alias, softdep bytes.Buffer
	var depIndex, aliasIndex, builtinIndex, builtinAliasIndex index
	for _, name := range slices.Sorted(maps.Keys(all)) {
		m := all[name]
		line := m.File + ":"
		// What is inserted first comes last.
		for _, d := range slices.Backward(needs(all, name)) {
			line += " " + all[d].File
		}
		fmt.Fprintln(&dep, line)
		depIndex.add(name, line, m.Rank)
		if dep.Len() > maxDependencies {
			return nil, ErrTooLarge
		}
		for _, a := range m.Aliases {
			fmt.Fprintf(&alias, "alias %s %s\n", a, name)
			aliasIndex.add(underscores(a), name, m.Rank)
		}
		for _, s := range m.Softdeps {
			fmt.Fprintf(&softdep, "softdep %s %s\n", name, s)
		}
	}
	for name, aliases := range builtin {
		builtinIndex.add(name, "", 0)
		for _, a := range aliases {
			builtinAliasIndex.add(underscores(a), name, 0)
		}
	}
	return map[string][]byte{
		"modules.dep": dep.Bytes(), "modules.alias": alias.Bytes(), "modules.softdep": softdep.Bytes(),
		"modules.dep.bin": depIndex.encode(), "modules.alias.bin": aliasIndex.encode(),
		"modules.builtin.bin":       builtinIndex.encode(),
		"modules.builtin.alias.bin": builtinAliasIndex.encode(),
	}, nil
}

// needs returns what a module depends on, each behind what it depends on itself; what is not there
// is built in.
func needs(all map[string]*Module, name string) (order []string) {
	seen := map[string]bool{name: true}
	var visit func(name string)
	visit = func(name string) {
		for _, d := range all[name].Depends {
			if seen[d] || all[d] == nil {
				continue
			}
			seen[d] = true
			visit(d)
			order = append(order, d)
		}
	}
	visit(name)
	return order
}

// underscores spells an alias as modprobe looks for it: with underscores for hyphens, but in
// brackets.
func underscores(alias string) string {
	b, inside := []byte(alias), false
	for i, c := range b {
		inside = c == '[' || inside && c != ']'
		if c == '-' && !inside {
			b[i] = '_'
		}
	}
	return string(b)
}

// index is a file in which modprobe finds keys quickly: a tree of the keys' characters, in which a
// node has what its keys share (the format is that of kmod's libkmod-index, version 2.1). Keys are
// ASCII.
type index struct{ values map[string][]indexValue }

type indexValue struct {
	text string
	rank uint32
}

const (
	indexMagic   = 0xb007f457
	indexVersion = 0x00020001
	indexHeader  = 12 // bytes

	// What a node has is said by the highest bits of where it is.
	indexPrefix   = 0x80000000
	indexValues   = 0x40000000
	indexChildren = 0x20000000
)

func (x *index) add(key, text string, rank uint32) {
	if strings.IndexFunc(key, func(r rune) bool { return r < ' ' || r > '~' }) >= 0 {
		return // nobody can ask for it
	}
	if x.values == nil {
		x.values = map[string][]indexValue{}
	}
	x.values[key] = append(x.values[key], indexValue{text, rank})
}

func (x *index) encode() []byte {
	out := make([]byte, indexHeader)
	binary.BigEndian.PutUint32(out, indexMagic)
	binary.BigEndian.PutUint32(out[4:], indexVersion)
	root := x.node(&out, slices.Sorted(maps.Keys(x.values)), 0)
	binary.BigEndian.PutUint32(out[8:], root)
	return out
}

// node writes the node of keys, which are sorted and equal in their first bytes, behind its
// children. It returns where it is.
func (x *index) node(out *[]byte, keys []string, equal int) uint32 {
	var prefix string
	if len(keys) > 0 {
		first, last := keys[0][equal:], keys[len(keys)-1][equal:]
		n := 0
		for n < min(len(first), len(last)) && first[n] == last[n] {
			n++
		}
		prefix = first[:n]
	}
	at := equal + len(prefix)
	var values []indexValue
	if len(keys) > 0 && len(keys[0]) == at {
		values, keys = x.values[keys[0]], keys[1:]
		slices.SortStableFunc(values, func(a, b indexValue) int {
			return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.text, b.text))
		})
	}
	children := map[byte]uint32{}
	for rest := keys; len(rest) > 0; {
		c := rest[0][at]
		n := slices.IndexFunc(rest, func(key string) bool { return key[at] != c })
		if n < 0 {
			n = len(rest)
		}
		children[c] = x.node(out, rest[:n], at+1)
		rest = rest[n:]
	}
	where := uint32(len(*out))
	b := *out
	if prefix != "" {
		where |= indexPrefix
		b = append(b, prefix+"\x00"...)
	}
	if len(keys) > 0 {
		where |= indexChildren
		first, last := keys[0][at], keys[len(keys)-1][at]
		b = append(b, first, last)
		for c := int(first); c <= int(last); c++ {
			b = binary.BigEndian.AppendUint32(b, children[byte(c)])
		}
	}
	if len(values) > 0 {
		where |= indexValues
		b = binary.BigEndian.AppendUint32(b, uint32(len(values)))
		for _, v := range values {
			b = binary.BigEndian.AppendUint32(b, v.rank)
			b = append(b, v.text+"\x00"...)
		}
	}
	*out = b
	return where
}

// Makes says whether depmod makes a file of a name, relative to /lib/modules/RELEASE.
func Makes(name string) bool {
	return path.Dir(name) == "." && slices.Contains([]string{
		"modules.dep", "modules.dep.bin", "modules.alias", "modules.alias.bin", "modules.symbols", "modules.symbols.bin",
		"modules.softdep", "modules.devname", "modules.builtin.bin", "modules.builtin.alias.bin",
	}, name)
}
