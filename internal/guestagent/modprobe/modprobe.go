// Package modprobe loads modules that a guest's kernel asks for, where the image has no program for
// that. Most images of containers have none: without it iptables, or a new kind of interface, needs
// modules that are there and that nothing loads.
package modprobe

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Offer has the kernel run the guest's first program, which is this one, in the place of a modprobe
// that the image does not have.
func Offer() error {
	const setting = "/proc/sys/kernel/modprobe"
	program, err := os.ReadFile(setting)
	if err != nil {
		return err
	}
	if _, err := os.Stat(strings.TrimSpace(string(program))); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return os.WriteFile(setting, []byte("/proc/1/exe"), 0)
}

// Asked returns what the kernel asks for with those arguments: a module or an alias (Linux,
// kernel/kmod.c).
func Asked(args []string) (name string, ok bool) {
	if len(args) != 3 || args[0] != "-q" || args[1] != "--" {
		return "", false
	}
	return args[2], true
}

// Load loads the modules of a name or an alias, and what they need, for the kernel that runs.
// Returns fs.ErrNotExist where there is none.
func Load(name string) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	dir := filepath.Join("/lib/modules", unix.ByteSliceToString(u.Release[:]))
	order, err := Find(os.DirFS(dir), name)
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range order {
		if err := insert(filepath.Join(dir, file)); err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("insert module %s: %w", file, err)) // others may do without
		}
	}
	return errors.Join(errs...)
}

// Insert gives a module to the kernel, which unpacks it where it is packed.
func insert(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if path.Ext(file) != ".ko" {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	return unix.FinitModule(int(f.Fd()), "", flags)
}

// Find returns the files, relative to tree, of the modules of a name or an alias, behind those that
// they need. Tree is a /lib/modules/RELEASE with the lists of depmod(8). Returns fs.ErrNotExist
// where there is none.
func Find(tree fs.FS, name string) (files []string, err error) {
	f := finder{needs: map[string][]string{}, soft: map[string][]string{}, seen: map[string]bool{}}
	err = errors.Join(
		lines(tree, "modules.dep", func(fields []string) {
			file := strings.TrimSuffix(fields[0], ":")
			f.needs[moduleName(file)] = append([]string{file}, fields[1:]...)
		}),
		lines(tree, "modules.softdep", func(fields []string) {
			// of several kmod takes the first, too
			if len(fields) > 2 && fields[0] == "softdep" && f.soft[underscores(fields[1])] == nil {
				f.soft[underscores(fields[1])] = fields[2:]
			}
		}),
		lines(tree, "modules.alias", func(fields []string) {
			if len(fields) == 3 && fields[0] == "alias" {
				f.aliases = append(f.aliases, [2]string{underscores(fields[1]), underscores(fields[2])})
			}
		}))
	if err != nil {
		return nil, err
	}
	if f.find(name); len(f.order) == 0 {
		err = fmt.Errorf("module %s: %w", name, fs.ErrNotExist)
	}
	return f.order, err
}

type finder struct {
	needs   map[string][]string // a module's file and those that it needs, what is to be inserted first last
	soft    map[string][]string // "pre:" and "post:", each before names or aliases
	aliases [][2]string         // patterns, and names of modules
	seen    map[string]bool
	order   []string
}

// find adds the modules of a name or an alias.
func (f *finder) find(name string) {
	name = underscores(name)
	if f.needs[name] != nil {
		f.add(name)
		return
	}
	for _, alias := range f.aliases {
		if ok, _ := path.Match(alias[0], name); ok {
			f.add(alias[1])
		}
	}
}

func (f *finder) add(name string) {
	if f.seen[name] || f.needs[name] == nil {
		return
	}
	f.seen[name] = true
	f.addSoft(name, "pre:")
	for i, file := range slices.Backward(f.needs[name]) {
		if i > 0 {
			f.add(moduleName(file))
			continue
		}
		f.order = append(f.order, file)
	}
	f.addSoft(name, "post:")
}

func (f *finder) addSoft(name, when string) {
	now := ""
	for _, word := range f.soft[name] {
		if strings.HasSuffix(word, ":") {
			now = word
		} else if now == when {
			f.find(word)
		}
	}
}

// lines calls take for each line of a list, if that is there.
func lines(tree fs.FS, name string, take func(fields []string)) error {
	f, err := tree.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if fields := strings.Fields(s.Text()); len(fields) > 0 && !strings.HasPrefix(fields[0], "#") {
			take(fields)
		}
	}
	return s.Err()
}

func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".")
	return underscores(name)
}

// underscores spells a name or an alias as the lists are searched: with underscores for hyphens,
// but in brackets.
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
