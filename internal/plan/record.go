package smartvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/strictjson"
)

// record is machine.json: what was asked for and what was decided when the VM was made. Of it Update alone changes
// anything; whether the VM runs is not in it.
type record struct {
	Version       int       `json:"version"` // recordVersion
	ID            string    `json:"id"`
	Nonce         string    `json:"nonce"` // tells this VM from another of the same id
	Created       time.Time `json:"created"`
	Spec          Spec      `json:"spec"` // paths absolute
	Binary        string    `json:"firecracker"`
	BinaryVersion string    `json:"firecrackerVersion"`
	Jailer        string    `json:"jailer,omitempty"` // "": started directly
	UID           int       `json:"uid,omitempty"`    // the VMM's, with a jailer
	Cgroup        string    `json:"cgroup,omitempty"`
	Ephemeral     bool      `json:"ephemeralWritableDrives"`
	Extract       bool      `json:"extract,omitempty"` // the kernel is packed
	Boot          *boot     `json:"boot,omitempty"`    // of a VM with an image
	// Interfaces are those that a network of ours is behind, in the spec's order.
	Interfaces []attach.Interface `json:"interfaces,omitempty"`
	// Staged tells by device id how its copy was made.
	Staged   map[string]StagedDrive `json:"staged,omitempty"`
	Restored *restored              `json:"restored,omitempty"` // of a VM that starts from a snapshot
	// Attached: the VM is one call's, it must not outlive who made it.
	Attached bool `json:"attached,omitempty"`
}

const recordVersion = 1

// StagedDrive is a VM's own copy of a drive, or what its layer lies over.
type StagedDrive struct {
	Path   string `json:"path"`
	Method string `json:"method"` // "overlay", "reflink" or "sparse-copy"
}

// maxRecord bounds a record in bytes. A Spec has at most maxSpec.
const maxRecord = 4 << 20

func readRecord(st *store.Store, id string) (*record, error) {
	r, err := readJSON[record](filepath.Join(st.Dir(id), store.MachineFile))
	if err != nil {
		return nil, err
	}
	if r.Version != recordVersion || r.ID != id {
		return nil, fmt.Errorf("%s has version %d and id %q: %w", store.MachineFile, r.Version, r.ID, ErrNotSupported)
	}
	return &r, nil
}

func (r *record) write(st *store.Store) error {
	return atomicfile.WriteJSON(filepath.Join(st.Dir(r.ID), store.MachineFile), r)
}

func readExit(st *store.Store, id string) (*Exit, error) {
	e, err := readJSON[Exit](filepath.Join(st.Dir(id), store.ExitFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return &e, err
}

func readJSON[T any](path string) (v T, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return v, err
	}
	if v, err = strictjson.Unmarshal[T](data, maxRecord); err != nil {
		err = fmt.Errorf("read %s: %w", path, err)
	}
	return v, err
}
