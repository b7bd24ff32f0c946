package smartvm

import (
	"cmp"
	"fmt"
	"os"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
)

// proposal gathers what this host offers to the VM of rec.
func (h *Host) proposal(rec *record) (*proposal, error) {
	p := &proposal{
		id: rec.ID, nonce: rec.Nonce, store: h.store, stageDir: h.stageDir(),
		binary: rec.Binary, jailer: rec.Jailer, uid: rec.UID, cgroup: rec.Cgroup, ephemeral: rec.Ephemeral, copies: rec.Staged, extract: rec.Extract, boot: rec.Boot,
		interfaces: rec.Interfaces, restored: rec.Restored, limits: h.opts.Images.Limits,
		reflinks: map[string]bool{}, inodes: map[string]string{}, owners: map[string]*stage.Owner{},
	}
	p.version, _ = firecracker.ParseVersion(rec.BinaryVersion) // written by us
	if r := rec.Restored; r != nil {
		p.stageDir = r.StageDir // not every process has the data directory in its options
	}
	p.uid = cmp.Or(p.uid, store.UID(h.RuntimeDir(), rec.ID, 0))
	for _, d := range devices(&rec.Spec, p) {
		if d.staged {
			if rec.Staged == nil {
				p.reflinks[d.path] = stage.CanReflink(d.path, p.stageDir)
			}
			continue
		}
		if d.readOnly {
			continue
		}
		fi, err := os.Stat(d.path)
		if err != nil {
			return nil, fmt.Errorf("look at drive %s: %w", d.id, err)
		}
		p.inodes[d.path] = store.DriveName(fi)
		if rec.Jailer == "" || !fi.Mode().IsRegular() {
			continue // a block device gets a node of its own in the jail
		}
		if p.owners[d.path], err = stage.NewOwner(d.path, p.uid, p.uid); err != nil {
			return nil, fmt.Errorf("look at drive %s: %w", d.id, err)
		}
	}
	return p, nil
}
