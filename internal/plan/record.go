// Package plan says what making and starting a VM does to its host, from what was asked for and
// what the host offers.
package plan

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/configure"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/spec"
	"push.rocks/smartvm/status"
)

// Record is machine.json: what was asked for and what was decided when the VM was made. Only an
// update of the VM changes anything in it; whether the VM runs is not in it.
type Record struct {
	Version       int       `json:"version"` // Version
	ID            string    `json:"id"`
	Nonce         string    `json:"nonce"` // tells this VM from another of the same id
	Created       time.Time `json:"created"`
	Spec          spec.Spec `json:"spec"` // paths absolute
	Binary        string    `json:"firecracker"`
	BinaryVersion string    `json:"firecrackerVersion"`
	Jailer        string    `json:"jailer,omitempty"` // "": started directly
	UID           int       `json:"uid,omitempty"`    // the VMM's, with a jailer
	Cgroup        string    `json:"cgroup,omitempty"`
	Ephemeral     bool      `json:"ephemeralWritableDrives"`
	Extract       bool      `json:"extract,omitempty"` // the kernel is packed
	Boot          *Boot     `json:"boot,omitempty"`    // of a VM with an image
	// Interfaces are those that a network of ours is behind, in the spec's order.
	Interfaces []attach.Interface `json:"interfaces,omitempty"`
	// Staged tells by device id how its copy was made.
	Staged   map[string]status.StagedDrive `json:"staged,omitempty"`
	Restored *Restored                     `json:"restored,omitempty"` // of a VM that starts from a snapshot
	// Attached: the VM belongs to one call, and must not outlive the process that made it.
	Attached bool `json:"attached,omitempty"`
}

// Boot is what a VM gets of its image.
type Boot struct {
	Users []string    `json:"users"`           // directories in which the VM says that it uses the image
	Guest *guest.Boot `json:"guest,omitempty"` // what its guest's first program is told
}

// Restored is what is different about a VM that starts from a snapshot.
type Restored struct {
	Load     configure.Restored `json:"load"`
	Snapshot string             `json:"snapshot"` // its id
	Dir      string             `json:"dir"`      // its directory
	StageDir string             `json:"stageDir"` // where drives are staged that can be reflinked there
	Was      []attach.Interface `json:"was,omitempty"`
	Hook     string             `json:"hook,omitempty"`
}

// Version is that of records.
const Version = 1

// AgentCID is a guest's context id for its agent, where the spec asks for no other: the VMM keeps
// those of different VMs apart.
const AgentCID = 3

// New begins the record of a new VM. If id is empty, it gets a random one.
func New(id string) *Record {
	return &Record{Version: Version, ID: cmp.Or(id, RandomHex(6)), Nonce: RandomHex(4), Created: time.Now().UTC()}
}

// RandomHex returns n random bytes as hexadecimal digits.
func RandomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// maxRecord bounds what machines write about VMs, in bytes.
const maxRecord = 4 << 20

// HasAgent says whether an agent of ours is in the guest.
func (r *Record) HasAgent() bool { return r.Boot != nil && r.Boot.Guest != nil }

// VMM is the version of the VMM that the VM was made with.
func (r *Record) VMM() firecracker.Version {
	v, _ := firecracker.ParseVersion(r.BinaryVersion) // written by us
	return v
}

// Read reads the record of a VM. Returns fs.ErrNotExist, and ErrNotSupported for one that another
// version of smartvm has written. Fields that are unknown are ignored: a newer smartvm of the same
// version of records may have more.
func Read(st *store.Store, id string) (*Record, error) {
	path := filepath.Join(st.Dir(id), store.MachineFile)
	r, err := atomicfile.ReadJSON[Record](path, maxRecord, Version)
	switch {
	case err != nil:
		return nil, err
	case r.Version < 1:
		err = &atomicfile.VersionError{Path: path, Version: r.Version, Newest: Version}
	case r.ID != id:
		err = fmt.Errorf("%s is of VM %q: %w", path, r.ID, spec.ErrNotSupported)
	}
	return &r, err
}

// Write writes it.
func (r *Record) Write(st *store.Store) error {
	return atomicfile.WriteJSON(filepath.Join(st.Dir(r.ID), store.MachineFile), r)
}

// ReadExit reads how a VM's last run ended, nil if it has not.
func ReadExit(st *store.Store, id string) (*status.Exit, error) {
	e, err := atomicfile.ReadJSON[status.Exit](filepath.Join(st.Dir(id), store.ExitFile), maxRecord, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return &e, err
}
