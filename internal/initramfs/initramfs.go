// Package initramfs puts the guest's first program and the kernel modules that it needs into an
// initramfs.
package initramfs

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/kernel"
)

// Options are what goes into an initramfs. Each half may be made alone: the kernel takes one
// archive behind the other.
type Options struct {
	Agent []byte // smartvm-agent, a static program for the guest's architecture; nil: no program
	// Modules is an unpacked /lib/modules/<Release>, of which the modules that a guest may need are
	// taken; nil: the kernel has them built in. If it is foreign, pass an os.Root's FS.
	Modules fs.FS
	Release string
}

// modules returns what a guest may need, in the order of insertion, and which of it must be there.
// crc32c_generic is what ext4, and libcrc32c for erofs, ask for by an alias, where it is not part
// of the kernel's library.
func modules() (names []string, essential map[string]bool) {
	names = []string{
		"virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "ipv6", "failover", "net_failover", "virtio_net",
		"vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "virtio-rng", "virtio_balloon",
		"squashfs", "crc32c_generic", "erofs", "overlay", "ext4",
	}
	return names, map[string]bool{"virtio_mmio": true, "virtio_blk": true, "overlay": true}
}

// Fingerprint changes with what Build takes of a kernel's modules.
func Fingerprint() string {
	names, _ := modules()
	sum := sha256.Sum256([]byte(strings.Join(names, " ")))
	return hex.EncodeToString(sum[:8])
}

// Build writes an initramfs, uncompressed. The same options give the same bytes. Returns the errors
// of kernel.Archive's AddModulesThere, and those of w.
func Build(w io.Writer, o Options) error {
	var a kernel.Archive
	var entries []kernel.Entry
	if o.Agent != nil {
		device := fs.ModeDevice | fs.ModeCharDevice
		entries = append(entries,
			kernel.Entry{Path: "init", Mode: 0o755, Content: o.Agent},
			kernel.Entry{Path: "dev/console", Mode: device | 0o600, Major: 5, Minor: 1},
			// What Go's runtime opens in place of a console that there is not.
			kernel.Entry{Path: "dev/null", Mode: device | 0o666, Major: 1, Minor: 3})
	}
	if o.Modules != nil {
		names, essential := modules()
		paths, err := a.AddModulesThere(o.Modules, o.Release, func(name string) bool { return essential[name] }, names...)
		if err != nil {
			return fmt.Errorf("build initramfs: %w", err)
		}
		entries = append(entries,
			kernel.Entry{Path: guest.ModuleList, Mode: 0o644, Content: []byte(strings.Join(paths, "\n"))})
	}
	for _, e := range entries {
		if err := a.Add(e); err != nil {
			return fmt.Errorf("build initramfs: %w", err)
		}
	}
	return a.Write(w)
}
