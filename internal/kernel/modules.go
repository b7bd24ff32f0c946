package kernel

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
)

// ErrNoModule says that a kernel has no module of a name, neither as a file nor
// built in.
var ErrNoModule = errors.New("no such kernel module")

// MissingError says which module a kernel lacks, or what that one depends on. It
// matches ErrNoModule.
type MissingError struct {
	Module, Release string
	Reason          error
}

func (e *MissingError) Error() string {
	return fmt.Sprintf("kernel %s has no %s, neither built in nor as a module: %v", e.Release, e.Module, e.Reason)
}

func (e *MissingError) Unwrap() error { return e.Reason }

const (
	maxModule     = 256 << 20 // bytes of a module, compressed or not
	maxModuleList = 16 << 20  // bytes of modules.dep and the like
	maxModules    = 1 << 16
)

// AddModules adds the modules of the given names and all that they depend on,
// decompressed, below /lib/modules/<release>. It returns their paths in the
// guest in an order in which an init can insert them; modules that the kernel
// has built in are left out. Names are those of modprobe ("-" and "_" are the
// same), but no aliases, and soft dependencies are not followed: where ext4 is a
// module, it needs crc32c_generic too. Calling it twice for one module is
// fs.ErrExist. After an error the archive may hold some of the modules.
//
// tree is an unpacked /lib/modules/<release>: modules.dep names the modules
// and their dependencies; where depmod has not been run yet, as in a package
// just unpacked, modules.order and the modules themselves do. If it is foreign,
// pass an os.Root's FS rather than os.DirFS, which symbolic links can leave.
//
// Errors match ErrNoModule, ErrCorrupt, ErrTooLarge or *CompressionError, or
// are those of tree.
func (a *Archive) AddModules(tree fs.FS, release string, names ...string) ([]string, error) {
	return a.AddModulesThere(tree, release, func(string) bool { return true }, names...)
}

// AddModulesThere is AddModules, but leaves out modules that the kernel does not
// have, or has without something that they depend on, unless needed says
// otherwise: that is a *MissingError.
func (a *Archive) AddModulesThere(tree fs.FS, release string, needed func(name string) bool,
	names ...string,
) ([]string, error) {
	if !validRelease(release) {
		return nil, fmt.Errorf("add modules of kernel %q: %w release", release, fs.ErrInvalid)
	}
	m, err := readModuleTree(tree, release)
	if err != nil {
		return nil, fmt.Errorf("add modules of kernel %s: %w", release, err)
	}
	r := resolver{moduleTree: m, state: map[string]visit{}}
	for _, name := range names {
		before := len(r.order)
		err := r.visit(moduleName(name))
		switch {
		case err == nil:
		case !errors.Is(err, ErrNoModule):
			return nil, fmt.Errorf("add modules of kernel %s: module %s: %w", release, name, err)
		case needed(name):
			return nil, fmt.Errorf("add modules: %w", &MissingError{Module: name, Release: release, Reason: err})
		default:
			r.forget(before)
		}
	}
	var paths []string
	for _, mod := range r.order {
		guestPath := path.Join("/lib/modules", release, mod.path)
		if err := a.Add(Entry{Path: guestPath, Mode: 0o644, Content: mod.content}); err != nil {
			return nil, err
		}
		paths = append(paths, guestPath)
	}
	return paths, nil
}

// moduleTree knows the modules of a kernel by name.
type moduleTree struct {
	fs      fs.FS
	files   map[string]string   // path of a module's file, as listed
	deps    map[string][]string // names; nil if only the modules know
	builtin map[string]bool
}

func readModuleTree(tree fs.FS, release string) (*moduleTree, error) {
	m := &moduleTree{fs: tree, files: map[string]string{}, builtin: map[string]bool{}}
	data, err := readFile(tree, "modules.builtin", maxModuleList)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		if line = strings.TrimSpace(line); line != "" {
			m.builtin[moduleName(line)] = true
		}
	}
	data, err = readFile(tree, "modules.dep", maxModuleList)
	if err == nil {
		m.deps = map[string][]string{}
		return m, m.parse("modules.dep", string(data), release)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	data, err = readFile(tree, "modules.order", maxModuleList)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("neither modules.dep nor modules.order: %w", err)
	}
	if err != nil {
		return nil, err
	}
	return m, m.parse("modules.order", string(data), release)
}

// parse reads modules.dep ("file: dependency...", a line each) or modules.order
// ("file"). Files are relative to the tree; old depmods wrote absolute paths.
// Of several files for one module the first counts.
func (m *moduleTree) parse(list, text, release string) error {
	n := 0
	for line := range strings.Lines(text) {
		n++
		file, deps, colon := strings.Cut(strings.TrimSpace(line), ":")
		if file == "" && !colon || strings.HasPrefix(file, "#") {
			continue
		}
		files := append([]string{file}, strings.Fields(deps)...)
		names := make([]string, len(files))
		for i := range files {
			files[i] = strings.TrimPrefix(files[i], "/lib/modules/"+release+"/")
			if !fs.ValidPath(files[i]) || !moduleFile(files[i]) {
				return fmt.Errorf("%s line %d: file %q: %w", list, n, files[i], ErrCorrupt)
			}
			names[i] = moduleName(files[i])
		}
		if colon != (m.deps != nil) {
			return fmt.Errorf("%s line %d: %w", list, n, ErrCorrupt)
		}
		if _, ok := m.files[names[0]]; ok {
			continue
		}
		if len(m.files) == maxModules {
			return fmt.Errorf("%s: more than %d modules: %w", list, maxModules, ErrTooLarge)
		}
		m.files[names[0]] = files[0]
		if m.deps != nil {
			m.deps[names[0]] = names[1:]
		}
	}
	return nil
}

// moduleSuffixes are what a module's file can end in. Lists written when the
// kernel was built name modules that were compressed later.
var moduleSuffixes = []string{"", ".xz", ".zst", ".gz"}

func moduleFile(file string) bool {
	return slices.ContainsFunc(moduleSuffixes, func(suffix string) bool { return strings.HasSuffix(file, ".ko"+suffix) })
}

// moduleName returns the name of the module in a file, or of a module.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// module is a module to be added. path is relative to the tree, without a
// compression's suffix.
type module struct {
	name    string
	path    string
	content []byte
}

// load reads a module that files lists.
func (m *moduleTree) load(name string) (module, error) {
	file := m.files[name]
	plain := file[:strings.LastIndex(file, ".ko")+len(".ko")]
	suffixes := moduleSuffixes
	if file != plain {
		suffixes = []string{file[len(plain):]}
	}
	var data []byte
	err := fs.ErrNotExist
	for _, suffix := range suffixes {
		if data, err = readFile(m.fs, plain+suffix, maxModule); !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if err != nil {
		return module{}, err
	}
	content, err := unpackModule(file, data)
	if err != nil {
		return module{}, err
	}
	return module{name: name, path: plain, content: content}, nil
}

func unpackModule(file string, data []byte) ([]byte, error) {
	compression, err := sniff(data)
	if err != nil {
		return nil, err
	}
	r, err := decompress(compression, bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("decompress %q: %w: %w", file, ErrCorrupt, err)
	}
	defer r.Close()
	content, err := readAtMost(r, maxModule)
	switch {
	case errors.Is(err, ErrTooLarge):
		return nil, fmt.Errorf("decompress %q: %w", file, err)
	case err != nil:
		return nil, fmt.Errorf("decompress %q: %w: %w", file, ErrCorrupt, err)
	}
	return content, nil
}

// depends returns the names in the "depends" fields of a module.
func depends(content []byte) ([]string, error) {
	fields, err := modinfo(content)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, field := range fields {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			for name := range strings.SplitSeq(list, ",") {
				names = append(names, moduleName(name))
			}
		}
	}
	return names, nil
}

// modinfo returns what a module says of itself, NAME=VALUE each.
func modinfo(content []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	info := f.Section(".modinfo")
	if info == nil || info.Type != elf.SHT_PROGBITS || info.Flags&elf.SHF_COMPRESSED != 0 {
		return nil, fmt.Errorf("no .modinfo section: %w", ErrCorrupt)
	}
	data, err := info.Data()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return strings.Split(string(data), "\x00"), nil
}

type visit int

const (
	visiting visit = iota + 1
	visited
)

// resolver orders modules behind their dependencies.
type resolver struct {
	*moduleTree
	state map[string]visit
	order []module
}

// forget undoes a visit that failed, before which there were so many in order.
func (r *resolver) forget(before int) {
	for _, mod := range r.order[before:] {
		delete(r.state, mod.name)
	}
	r.order = r.order[:before]
	maps.DeleteFunc(r.state, func(_ string, v visit) bool { return v == visiting })
}

func (r *resolver) visit(name string) error {
	switch r.state[name] {
	case visited:
		return nil
	case visiting:
		return fmt.Errorf("depends on itself: %w", ErrCorrupt)
	}
	if _, ok := r.files[name]; !ok {
		if r.builtin[name] {
			return nil
		}
		return ErrNoModule
	}
	r.state[name] = visiting
	mod, err := r.load(name)
	if err != nil {
		return err
	}
	deps := r.deps[name]
	if r.deps == nil {
		if deps, err = depends(mod.content); err != nil {
			return err
		}
	}
	for _, dep := range deps {
		if err := r.visit(dep); err != nil {
			return fmt.Errorf("dependency %s: %w", dep, err)
		}
	}
	r.state[name] = visited
	r.order = append(r.order, mod)
	return nil
}
