package spec

import (
	"fmt"
	"path"
	"strings"
)

// Volume is a directory or a file of the host of which the guest of an image has a copy, made anew at each start. What the host changes
// meanwhile is not seen in the guest, and what the guest writes goes when the VM stops, unless it is copied back.
type Volume struct {
	Source   string `json:"source"`
	Target   string `json:"target"` // absolute, in the guest; made if it is not there
	ReadOnly bool   `json:"readOnly,omitempty"`
	// Sync copies what the guest has changed back to Source when the VM ends. What the host has changed in the same place stays, and
	// the guest's version is put beside it.
	Sync bool `json:"sync,omitempty"`
}

// Drive ids of a VM that has volumes.
const (
	VolumeDrive  = "volumes" // what was copied
	ChangesDrive = "changes" // what the guest writes there
)

const maxVolumes = 16

func (s Spec) checkVolumes(p *problems) {
	p.require(s.Image != "" || len(s.Volumes) == 0, "volumes", nil, "is only for a VM with an image")
	p.require(len(s.Volumes) <= maxVolumes, "volumes", len(s.Volumes), fmt.Sprintf("must be at most %d", maxVolumes))
	seen := map[string]string{}
	for i, v := range s.Volumes {
		at := fmt.Sprintf("volumes[%d].", i)
		p.hostPath(at+"source", v.Source, maxPathBytes)
		p.require(!v.ReadOnly || !v.Sync, at+"sync", nil, "cannot be combined with readOnly")
		if !p.given(at+"target", v.Target) {
			continue
		}
		p.text(at+"target", v.Target, maxPathBytes)
		p.require(path.IsAbs(v.Target) && path.Clean(v.Target) == v.Target && v.Target != "/", at+"target", v.Target,
			"must be an absolute path without . and .., and not / itself")
		for _, system := range []string{"/proc", "/sys", "/dev", "/run/secrets"} {
			p.require(v.Target != system && !strings.HasPrefix(v.Target, system+"/"), at+"target", v.Target, "must not be in "+system)
		}
		p.require(v.Target != "/run", at+"target", v.Target, "must not be /run itself")
		p.unique(at+"target", v.Target, seen)
	}
}
