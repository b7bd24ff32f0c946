package spec

import (
	"fmt"
	"path"
	"strings"
)

// Volume is a directory or a file of the host of which the guest of an image has a copy, made anew
// at each start. What the host changes meanwhile is not seen in the guest, and what the guest
// writes goes when the VM stops, unless it is copied back.
type Volume struct {
	Source   string `json:"source"`
	Target   string `json:"target"` // absolute, in the guest; made if it is not there
	ReadOnly bool   `json:"readOnly,omitempty"`
	// Sync copies what the guest has changed back to Source when the VM ends. What the host has
	// changed in the same place stays, and the guest's version is put beside it.
	Sync bool `json:"sync,omitempty"`
}

// NamedVolume is a disk of the host's that is made, with an empty ext4, for the first VM that names
// it, and stays when that is removed. It has its first content from the image: what is below Target
// there. One VM at a time can run with it.
type NamedVolume struct {
	Name    string `json:"name"`              // 1-64 of [A-Za-z0-9_.-], beginning with a letter or digit
	Target  string `json:"target"`            // absolute, in the guest; made if it is not there
	SizeMiB int    `json:"sizeMib,omitempty"` // MiB, ≥ 16, when it is made; 0: DefaultVolumeMiB
	// ReadOnly mounts it so. That is the guest's own doing: its root can mount it otherwise.
	ReadOnly bool `json:"readOnly,omitempty"`
}

// DefaultVolumeMiB is the size of a named volume, of which only what is written takes space.
const DefaultVolumeMiB = 10240

// Drive ids of a VM that has volumes.
const (
	VolumeDrive  = "volumes" // what was copied
	ChangesDrive = "changes" // what the guest writes there
)

// NamedDrive is the drive id of the i-th named volume, counted from 0.
func NamedDrive(i int) string { return fmt.Sprintf("volume%d", i) }

const (
	maxVolumes      = 16
	maxNamedVolumes = 8 // a VM has about 16 devices in all
)

func (s Spec) checkVolumes(p *problems) {
	p.require(s.Image != "" || len(s.Volumes) == 0, "volumes", nil, "is only for a VM with an image")
	p.require(len(s.Volumes) <= maxVolumes, "volumes", len(s.Volumes), fmt.Sprintf("must be at most %d", maxVolumes))
	seen := map[string]string{}
	for i, v := range s.Volumes {
		at := fmt.Sprintf("volumes[%d].", i)
		p.hostPath(at+"source", v.Source, maxPathBytes)
		p.require(!v.ReadOnly || !v.Sync, at+"sync", nil, "cannot be combined with readOnly")
		p.volumeTarget(at+"target", v.Target, seen)
	}
	s.checkNamedVolumes(p, seen)
}

// checkNamedVolumes gets the targets that are taken.
func (s Spec) checkNamedVolumes(p *problems, targets map[string]string) {
	p.require(s.Image != "" || len(s.NamedVolumes) == 0, "namedVolumes", nil, "is only for a VM with an image")
	p.require(len(s.NamedVolumes) <= maxNamedVolumes, "namedVolumes", len(s.NamedVolumes),
		fmt.Sprintf("must be at most %d", maxNamedVolumes))
	names := map[string]string{}
	for i, v := range s.NamedVolumes {
		at := fmt.Sprintf("namedVolumes[%d].", i)
		if p.given(at+"name", v.Name) {
			p.require(isID(v.Name, "_.-") && isID(v.Name[:1], ""), at+"name", v.Name,
				"must be 1 to 64 letters, digits, underscores, dots or hyphens and begin with a letter or digit")
			p.unique(at+"name", v.Name, names)
		}
		p.require(v.SizeMiB == 0 || v.SizeMiB >= minScratchMiB && v.SizeMiB <= maxScratchMiB, at+"sizeMib", v.SizeMiB,
			fmt.Sprintf("must be from %d to %d", minScratchMiB, maxScratchMiB))
		p.volumeTarget(at+"target", v.Target, targets)
	}
}

// volumeTarget checks a path in the guest.
func (p *problems) volumeTarget(at, target string, seen map[string]string) {
	if !p.given(at, target) {
		return
	}
	p.text(at, target, maxPathBytes)
	p.require(path.IsAbs(target) && path.Clean(target) == target && target != "/", at, target,
		"must be an absolute path without . and .., and not / itself")
	for _, system := range []string{"/proc", "/sys", "/dev", "/run/secrets"} {
		p.require(target != system && !strings.HasPrefix(target, system+"/"), at, target, "must not be in "+system)
	}
	p.require(target != "/run", at, target, "must not be /run itself")
	p.unique(at, target, seen)
}
