package lab

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/kernel"
)

//go:embed init.sh
var initScript []byte

//go:embed start.sh
var startScript []byte

// firstModules lead to the root file system and the ports.
func firstModules() []string {
	return []string{"virtio_pci", "9pnet_virtio", "9p", "virtio_console", "overlay"}
}

// thenModules are what a host of microVMs has. Others load on demand.
func thenModules() []string {
	return []string{"kvm_amd", "tun", "bridge", "loop", "vhost_vsock"}
}

// initramfs returns a file without a name that holds what the lab boots into.
// The caller closes it. Making it takes less time than knowing that one made
// earlier is still right.
func (c Config) initramfs(marker string) (_ *os.File, err error) {
	archive, err := c.archive(marker)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("initramfs", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create initramfs: %w", err)
	}
	f := os.NewFile(uintptr(fd), "initramfs")
	if err := archive.Write(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (c Config) archive(marker string) (*kernel.Archive, error) {
	release := filepath.Base(c.Modules)
	tree := os.DirFS(c.Modules)
	// The order of all begins with the order of the first.
	first, err := new(kernel.Archive).AddModules(tree, release, firstModules()...)
	if err != nil {
		return nil, err
	}
	archive := new(kernel.Archive)
	all, err := archive.AddModules(tree, release, append(firstModules(), thenModules()...)...)
	if err != nil {
		return nil, err
	}
	lines := func(s []string) []byte { return []byte(strings.Join(s, "\n") + "\n") }
	for _, e := range []kernel.Entry{
		{Path: "/init", Mode: 0o755, Content: initScript},
		{Path: "/bin/busybox", Mode: 0o755, HostPath: c.Busybox},
		{Path: "/proc", Mode: os.ModeDir | 0o755},
		{Path: "/sys", Mode: os.ModeDir | 0o755},
		{Path: "/dev", Mode: os.ModeDir | 0o755},
		{Path: "/lab/start.sh", Mode: 0o644, Content: startScript},
		{Path: "/lab/config.sh", Mode: 0o644, Content: c.configScript(release, marker)},
		{Path: "/lab/job.sh", Mode: 0o644, Content: c.jobScript()},
		{Path: "/lab/first-modules", Mode: 0o644, Content: lines(all[:len(first)])},
		{Path: "/lab/then-modules", Mode: 0o644, Content: lines(all[len(first):])},
	} {
		if err := archive.Add(e); err != nil {
			return nil, err
		}
	}
	return archive, nil
}

func (c Config) configScript(release, marker string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "release=%s\nmodules=%s\nmarker=%s\n", quote(release), quote(c.Modules), marker)
	for i, dir := range c.Share {
		fmt.Fprintf(&b, "share%d=%s\n", i, quote(dir))
	}
	return []byte(b.String())
}

func (c Config) jobScript() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "cd %s || exit 126\n", quote(c.Dir))
	b.WriteString("exec /run/lab/busybox setsid /run/lab/busybox env -i")
	for _, s := range append(append([]string{}, c.Env...), c.Command...) {
		b.WriteString(" " + quote(s))
	}
	b.WriteByte('\n')
	return []byte(b.String())
}

// quote quotes a word for the shell.
func quote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
