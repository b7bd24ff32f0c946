package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/sealed"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/spec"
)

// manifestVersion is the form of manifests that this program writes, and the newest that it reads.
const manifestVersion = 1

// Limits of a manifest.
const (
	maxManifest = 4 << 20 // bytes
	MaxMachine  = 1 << 20 // bytes of Manifest.Machine
	maxFiles    = 1024
	maxExternal = 1024
	maxLabels   = 256
	maxText     = 4096    // bytes of any other text
	maxFileSize = 1 << 44 // bytes
	maxDepth    = 4       // parts of a path in a snapshot
	// maxState bounds the VMM's state, in bytes: it is read as a whole before each use. The VMM's own
	// limit is a sixth of it.
	maxState = 64 << 20
)

// Manifest describes a snapshot. Its JSON form is stable, and what is kept on disk.
type Manifest struct {
	Version int               `json:"version"`
	ID      string            `json:"id"`
	Name    string            `json:"name,omitempty"`
	Created time.Time         `json:"created"`
	Labels  map[string]string `json:"labels,omitempty"`
	// id of the snapshot that the VM came from or that a diff was merged with; it is not needed
	Parent string `json:"parent,omitempty"`

	Firecracker string `json:"firecracker"` // the VMM that made it: "1.12.1"
	// of the state, as the VMM's program names it: "6.0.0"; empty where it was not asked
	Format      string `json:"format,omitempty"`
	Arch        string `json:"arch"`                  // as Go spells it; Commit fills it in
	CPUVendor   string `json:"cpuVendor,omitempty"`   // HostFacts say what these are
	CPUModel    string `json:"cpuModel,omitempty"`    //
	CPUTemplate string `json:"cpuTemplate,omitempty"` // what the VMM was told to make of the CPU; empty: nothing
	HostKernel  string `json:"hostKernel,omitempty"`
	MemSizeMiB  int    `json:"memSizeMib"`
	HugePages   string `json:"hugePages,omitempty"` // "2M" or empty

	// Ephemeral snapshots are those of a fork. They go with their last user, and of their files only
	// the state has a digest.
	Ephemeral bool          `json:"ephemeral,omitempty"`
	Paused    time.Duration `json:"pausedNs"` // how long the VM was
	// Imported snapshots came in an archive: what External and Machine say of this host is its maker's
	// word, and whoever restores one must not follow it to files that the maker could not have.
	Imported bool `json:"imported,omitempty"`

	Files    map[string]File `json:"files"` // by path in the directory; Commit finds them
	External []External      `json:"external,omitempty"`
	Machine  json.RawMessage `json:"machine,omitempty"` // its maker's own, not looked at
	Sum      string          `json:"sum,omitempty"`     // in the file alone: see package sealed
}

// File is one file of a snapshot.
type File struct {
	Size   int64  `json:"size"`             // bytes
	Digest string `json:"digest,omitempty"` // see kept.Digest
}

// External is a file elsewhere that a VM of the snapshot reads, and that is not part of it.
type External struct {
	Device string `json:"device"` // drive or pmem id
	Path   string `json:"path"`
	Size   int64  `json:"size"`             // bytes
	SHA256 string `json:"sha256,omitempty"` // where it is known
}

// validate says all that is wrong with a manifest, but for what only its files can show.
func (m *Manifest) validate() error { return errors.Join(m.validateSelf(), m.validateFiles()) }

// faults are all that is wrong with a manifest.
type faults []error

func (f *faults) check(ok bool, format string, args ...any) {
	if !ok {
		*f = append(*f, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
	}
}

func (m *Manifest) validateSelf() error {
	var errs faults
	errs.check(m.Version >= 1 && m.Version <= manifestVersion, "version %d, not %d", m.Version, manifestVersion)
	errs.check(validID(m.ID), "id %.64q", m.ID)
	errs.check(m.Name == "" ||
		validName(m.Name), "name %.64q must be 1 to 64 letters, digits and .-_, none of these first", m.Name)
	errs.check(m.Parent == "" || validID(m.Parent), "parent %.64q", m.Parent)
	errs.check(m.HugePages == "" || m.HugePages == "2M", "huge pages %.64q", m.HugePages)
	errs.check(m.MemSizeMiB > 0 && int64(m.MemSizeMiB) <= maxFileSize>>20, "%d MiB of memory", m.MemSizeMiB)
	errs.check(m.Paused >= 0, "paused for %v", m.Paused)
	errs.check(len(m.Labels) <= maxLabels, "%d labels", len(m.Labels))
	for k, v := range m.Labels {
		errs.check(k != "" && len(k) <= maxText && len(v) <= maxText, "label %.64q", k)
	}
	for _, text := range []string{m.Firecracker, m.Format, m.Arch, m.CPUVendor, m.CPUModel, m.CPUTemplate, m.HostKernel} {
		errs.check(len(text) <= maxText, "%.64q is too long", text)
	}
	errs.check(m.Firecracker != "", "no version of Firecracker")
	errs.check(m.Arch != "", "no architecture")
	errs.check(len(m.Machine) <= MaxMachine, "%d bytes about the machine", len(m.Machine))
	errs.check(len(m.External) <= maxExternal, "%d files elsewhere", len(m.External))
	for _, e := range m.External {
		errs.check(e.Device != "" && len(e.Device) <= maxText && filepath.IsAbs(e.Path) && len(e.Path) <= maxText &&
			!strings.ContainsRune(e.Path, 0) &&
			e.Size >= 0 && (e.SHA256 == "" || kept.ValidDigest(e.SHA256)), "file elsewhere %.64q", e.Path)
	}
	return errors.Join(errs...)
}

func (m *Manifest) validateFiles() error {
	var errs faults
	errs.check(len(m.Files) <= maxFiles, "%d files", len(m.Files))
	for name, f := range m.Files {
		errs.check(validPath(name), "path %.64q", name)
		errs.check(f.Size >= 0 && f.Size <= maxFileSize, "%.64s has %d bytes", name, f.Size)
		errs.check(f.Digest == "" && m.Ephemeral || kept.ValidDigest(f.Digest), "%.64s has digest %.64q", name, f.Digest)
		for dir := path.Dir(name); dir != "." && dir != "/"; dir = path.Dir(dir) {
			_, both := m.Files[dir]
			errs.check(!both, "%.64s is a file and a directory", dir)
		}
	}
	state, hasState := m.Files[StateFile]
	memory, ok := m.Files[MemoryFile]
	errs.check(hasState, "no file %s", StateFile)
	errs.check(!hasState || state.Size > 0 && state.Size <= maxState, "%s has %d bytes", StateFile, state.Size)
	errs.check(ok, "no file %s", MemoryFile)
	// What can be plugged in later comes after what the guest has.
	errs.check(!ok || memory.Size>>20 >= int64(m.MemSizeMiB) &&
		memory.Size%pageSize == 0, "%s has %d bytes, of a guest of %d MiB", MemoryFile, memory.Size, m.MemSizeMiB)
	return errors.Join(errs...)
}

const pageSize = 4096

// validPath says whether a file of a snapshot can be at a path: a clean one below its directory, of
// plain characters, and not one of our own.
func validPath(name string) bool {
	parts := strings.Split(name, "/")
	if len(name) > 255 || len(parts) > maxDepth {
		return false
	}
	for _, part := range parts {
		if !validChars(part, "-_.") || part[0] == '.' || part[0] == '-' {
			return false
		}
	}
	return parts[0] != manifestFile && parts[0] != seenFile && parts[0] != store.TouchedFile &&
		parts[0] != kept.UsersDir && !strings.HasSuffix(name, atomicfile.TempSuffix)
}

// readManifest reads the manifest in a snapshot's directory, with fs.ErrNotExist where there is
// none.
func readManifest(dir string) (*Manifest, error) {
	f, err := os.OpenFile(filepath.Join(dir, manifestFile), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(data)
	if err == nil && m.ID != filepath.Base(dir) {
		err = fmt.Errorf("it is that of %s", m.ID)
	}
	if errors.Is(err, spec.ErrNotSupported) {
		return nil, fmt.Errorf("snapshot %s: %s: %w", filepath.Base(dir), manifestFile, err)
	}
	if err != nil {
		return nil, &DamagedError{ID: filepath.Base(dir), File: manifestFile, Reason: "is no manifest of it: " + err.Error()}
	}
	return m, nil
}

// encode is not indented: Machine comes back as it was, and no longer.
func (m *Manifest) encode() ([]byte, error) {
	text, err := json.Marshal(m)
	if text = sealed.Seal(text); err == nil && len(text) > maxManifest {
		err = fmt.Errorf("manifest has %d bytes", len(text))
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return text, nil
}

// parseManifest returns spec.ErrNotSupported for the manifest of another version of smartvm: what
// it has more than ours may be needed to restore the snapshot rightly.
func parseManifest(data []byte) (*Manifest, error) {
	if len(data) <= maxManifest && !sealed.Whole(data) {
		return nil, errors.New("it is not what was written")
	}
	var head struct {
		Version int `json:"version"`
	}
	if len(data) <= maxManifest && json.Unmarshal(data, &head) == nil && head.Version > manifestVersion {
		return nil, hint.Add(
			fmt.Errorf("%w: it has version %d, this smartvm reads version %d", spec.ErrNotSupported, head.Version,
				manifestVersion),
			"use the smartvm that made it, or a newer one")
	}
	m, err := atomicfile.DecodeStrict[Manifest](data, maxManifest)
	m.Sum = ""
	if err == nil {
		err = m.validate()
	}
	return &m, err
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
