package spec

import (
	"fmt"
	"strings"
)

// Drive ids of a VM that boots an image. The guest has the first two as /dev/vda and /dev/vdb.
const (
	RootDrive    = "rootfs"  // the image's file system
	ScratchDrive = "scratch" // what the guest writes
	GuestDrive   = "guest"   // what the guest's first program is told
	ModulesDrive = "modules" // the modules of a distribution's kernel
)

const (
	maxImageName  = 512       // bytes
	maxGuestBytes = 128 << 10 // of arguments and environment
	minScratchMiB = 16
	maxScratchMiB = 16 << 20
)

// checkImage checks what only an image needs.
func (s Spec) checkImage(p *problems) {
	if s.Image == "" {
		for _, f := range []struct {
			path  string
			given bool
		}{
			{"kernel", s.Kernel != ""},
			{"scratch", s.Scratch != nil},
			{"entrypoint", s.Entrypoint != nil},
			{"command", len(s.Command) > 0},
			{"env", len(s.Env) > 0},
			{"user", s.User != ""},
			{"workingDir", s.WorkingDir != ""},
			{"systemd", s.Systemd != ""},
			{"hostname", s.Hostname != ""},
			{"publishAll", s.PublishAll},
		} {
			p.require(!f.given, f.path, nil, "is only for a VM with an image")
		}
		return
	}
	p.text("image", s.Image, maxImageName)
	p.text("kernel", s.Kernel, maxImageName)
	p.require(s.Kernel == "" || s.BootSource.KernelImagePath == "", "kernel", s.Kernel,
		"cannot be combined with bootSource.kernelImagePath")
	p.text("user", s.User, maxImageName)
	p.text("workingDir", s.WorkingDir, maxPathBytes)
	p.require(s.WorkingDir == "" || s.WorkingDir[0] == '/', "workingDir", s.WorkingDir, "must be absolute")
	p.require(s.Hostname == "" || isID(s.Hostname, ".-") && s.Hostname[0] != '-' &&
		s.Hostname[0] != '.', "hostname", s.Hostname,
		"must be 1 to 64 letters, digits, dots or hyphens and begin with a letter or digit")
	p.oneOf("systemd", s.Systemd, SystemdTrue, SystemdFalse, SystemdAlways)
	cleared := s.Entrypoint != nil && (len(s.Entrypoint) == 0 || s.Entrypoint[0] == "")
	p.require(len(s.Entrypoint) < 2 || !cleared, "entrypoint[0]", "", "must be a program's name, or the only element")
	p.require(!cleared ||
		len(s.Command) > 0, "command", nil, "is required where entrypoint is empty: there is nothing to run")
	total := 0
	for _, list := range []struct {
		path  string
		texts []string
	}{{"entrypoint", s.Entrypoint}, {"command", s.Command}, {"env", s.Env}} {
		for i, text := range list.texts {
			at := fmt.Sprintf("%s[%d]", list.path, i)
			p.text(at, text, maxGuestBytes)
			name, _, ok := strings.Cut(text, "=")
			// without its value, which may be secret
			p.require(list.path != "env" || ok && name != "", at, nil, "must be NAME=VALUE")
			total += len(text) + 1
		}
	}
	p.require(total <= maxGuestBytes, "command", total,
		fmt.Sprintf("must be, with entrypoint and env, at most %d bytes long", maxGuestBytes))
	if c := s.Scratch; c != nil {
		p.require(c.SizeMiB == 0 || c.SizeMiB >= minScratchMiB && c.SizeMiB <= maxScratchMiB, "scratch.sizeMib", c.SizeMiB,
			fmt.Sprintf("must be from %d to %d", minScratchMiB, maxScratchMiB))
		p.require(c.Keep == "" || isID(c.Keep, "_.-") && isID(c.Keep[:1], ""), "scratch.keep", c.Keep,
			"must be 1 to 64 letters, digits, underscores, dots or hyphens and begin with a letter or digit")
	}
}

// text checks one that may be empty.
func (p *problems) text(path, value string, maxBytes int) {
	p.require(!strings.Contains(value, "\x00"), path, nil, "must not hold a NUL byte")
	p.require(len(value) <= maxBytes, path, nil, fmt.Sprintf("must be at most %d bytes long", maxBytes))
}
