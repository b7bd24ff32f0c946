// Package restore has what a snapshot keeps of its VM, what of that is trusted, and makes the
// record of a new VM of it.
package restore

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/snapshot"
	"push.rocks/smartvm/spec"
)

// Saved is what a snapshot keeps of its VM.
type Saved struct {
	Spec       spec.Spec          `json:"spec"` // paths below the data directory are relative to it
	Guest      *guest.Boot        `json:"guest,omitempty"`
	Images     []string           `json:"images,omitempty"` // where users of the image say so, likewise
	Drives     []string           `json:"drives,omitempty"` // that are in the snapshot, by id
	Interfaces []attach.Interface `json:"interfaces,omitempty"`
	Hook       string             `json:"hook,omitempty"`
	Balloon    *uint32            `json:"balloon,omitempty"` // MiB that it is to have: it took more for the snapshot
}

// Read reads it. The error is snapshot.ErrDamaged, or spec.ErrNotSupported where another version of
// smartvm has written more than is known here: the VM would lack that.
func Read(sn *snapshot.Snapshot) (*Saved, error) {
	s, err := atomicfile.DecodeStrict[Saved](sn.Machine, snapshot.MaxMachine)
	switch {
	case errors.Is(err, spec.ErrNotSupported):
		err = fmt.Errorf("snapshot %s: what it says of the VM: %w", sn.ID, err)
	case err != nil:
		err = fmt.Errorf("%w: what it says of the VM: %w", snapshot.ErrDamaged, err)
	}
	return &s, err
}

// Describe completes a snapshot's manifest, and s, of which it becomes a part, by what its VM is
// and where its files are.
func (s *Saved) Describe(m *snapshot.Manifest, rec *plan.Record, data Data) (err error) {
	s.Spec, s.Interfaces = rec.Spec, rec.Interfaces
	if rec.HasAgent() {
		s.Guest = rec.Boot.Guest
	}
	s.Spec.Drives, s.Spec.Pmem = slices.Clone(s.Spec.Drives), slices.Clone(s.Spec.Pmem)
	paths := map[string]*string{}
	for i := range s.Spec.Drives {
		paths[s.Spec.Drives[i].DriveID] = &s.Spec.Drives[i].PathOnHost
	}
	for i := range s.Spec.Pmem {
		paths[s.Spec.Pmem[i].ID] = &s.Spec.Pmem[i].PathOnHost
	}
	for id, path := range paths {
		if slices.Contains(s.Drives, id) {
			continue
		}
		fi, err := os.Stat(*path)
		if err != nil {
			return err
		}
		absolute := *path
		if *path = data.portable(*path); *path == absolute { // what is in the data directory is looked for in that
			m.External = append(m.External, snapshot.External{Device: id, Path: absolute, Size: fi.Size()})
		}
		if rec.Boot == nil {
			continue
		}
		for _, users := range rec.Boot.Users {
			if users = data.portable(users); strings.HasPrefix(*path, filepath.Dir(users)+"/") {
				s.Images = append(s.Images, users)
			}
		}
	}
	c := rec.Spec.MachineConfig
	m.Firecracker, m.MemSizeMiB, m.CPUTemplate = rec.BinaryVersion, c.MemSizeMiB, c.CPUTemplate
	if c.HugePages == "2M" { // others take no pages of a pool
		m.HugePages = c.HugePages
	}
	if rec.Spec.CPUConfig != nil {
		m.CPUTemplate = cmp.Or(m.CPUTemplate, "custom")
	}
	m.Machine, err = json.Marshal(s)
	return err
}

// Data is the path of a data directory.
type Data string

// portable makes a path below the data directory relative to it.
func (d Data) portable(path string) string {
	if rel, err := filepath.Rel(string(d), path); err == nil && filepath.IsLocal(rel) {
		return rel
	}
	return path
}

// local is the reverse of portable.
func (d Data) local(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(string(d), path)
}

// Refer says in the image of a snapshot's VM that the snapshot needs it. The VM that it was made of
// does so too.
func (d Data) Refer(sn *snapshot.Snapshot) error {
	s, err := Read(sn)
	if err != nil {
		return err
	}
	for _, users := range s.Images {
		if sn.Imported && !isUsers(users) {
			continue
		}
		err := os.Symlink(sn.Dir(), filepath.Join(d.local(users), reference(sn.ID)))
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("refer to the image of snapshot %s: %w", sn.ID, err)
		}
	}
	return nil
}

// Unrefer takes back what Refer has said for snapshots that are gone.
func (d Data) Unrefer(snapshots []string) error {
	var errs []error
	for _, id := range snapshots {
		for _, dir := range []string{store.ImageDir + "/objects", store.BaseDir} {
			all, _ := filepath.Glob(filepath.Join(string(d), dir, "*/users", reference(id))) // the pattern is well-formed
			for _, path := range all {
				if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}

// reference is the name by which a snapshot says in an image that it needs it.
func reference(id string) string { return "snapshot-" + id }

// Missing says what of this host VMs of a snapshot would read that is not here, and what to do
// about it.
func (d Data) Missing(s *Saved) error {
	var errs []error
	look := func(id, path string) {
		if slices.Contains(s.Drives, id) {
			return
		}
		_, err := os.Stat(d.local(path))
		switch {
		case err != nil && id == spec.ModulesDrive:
			err = hint.Add(fmt.Errorf("the kernel's modules are not here, or not the same: drive %s: %w", id, err),
				"smartvm image import --kernel VMLINUZ --modules DIR kernel, with those of its kernel")
		case err != nil && !filepath.IsAbs(path) && s.Spec.Image != "":
			err = hint.Add(fmt.Errorf("image %s is not here, or not the same: drive %s: %w", s.Spec.Image, id, err),
				"smartvm image pull %s", s.Spec.Image)
		case err != nil:
			err = hint.Add(fmt.Errorf("drive %s: %w", id, err), "bring it back: the guest has it open")
		}
		errs = append(errs, err)
	}
	for _, drive := range s.Spec.Drives {
		look(drive.DriveID, drive.PathOnHost)
	}
	for _, p := range s.Spec.Pmem {
		look(p.ID, p.PathOnHost)
	}
	return errors.Join(errs...)
}
