package guestagent

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/guestagent/disk"
	"push.rocks/smartvm/internal/guestagent/fill"
	"push.rocks/smartvm/internal/guestagent/modprobe"
)

const (
	maxModuleList = 64 << 10 // bytes
	sectorSize    = 512
)

// modules are the initramfs's, in the order of insertion.
type modules []string

// openModules returns those that are in the initramfs.
func openModules() (modules, error) {
	f, err := os.Open(guest.ModuleList)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the kernel has all built in
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m, err := readModuleList(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", guest.ModuleList, err)
	}
	return m, nil
}

// split parts those without which there are no drives from what comes later.
func (m modules) split() (first, rest modules) {
	n := 0
	for i, path := range m {
		switch moduleName(path) {
		case "virtio", "virtio_ring", "virtio_mmio", "virtio_pci", "virtio_blk":
			n = i + 1
		}
	}
	return m[:n], m[n:]
}

// moduleName is a module's name as the kernel has it.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".")
	return strings.ReplaceAll(name, "-", "_")
}

// insert inserts modules but those that unwanted has. Whether one that cannot be inserted is needed
// will show.
func (m modules) insert(unwanted map[string]bool) {
	for _, file := range m {
		if unwanted[moduleName(file)] {
			continue
		}
		if err := insertModule(file); err != nil && !errors.Is(err, unix.EEXIST) {
			say("insert module %s: %v", file, err)
		}
	}
}

// Kinds of virtio devices.
const (
	virtioNet     = 1
	virtioRNG     = 4
	virtioBalloon = 5
	virtioVsock   = 19
)

// unwanted are modules of no use to this guest: each one takes the kernel longer to load than all
// that we do ourselves. Sys lists devices and drives, as in /sys.
func unwanted(b *guest.Boot, sys string) map[string]bool {
	kinds := map[int]bool{}
	devices, _ := filepath.Glob(filepath.Join(sys, "bus/virtio/devices/*/device"))
	for _, device := range devices {
		text, err := os.ReadFile(device)
		if kind, parseErr := strconv.ParseInt(strings.TrimSpace(string(text)), 0, 32); err == nil && parseErr == nil {
			kinds[int(kind)] = true
		}
	}
	known := 2 // the root, and what we have read
	for _, device := range []string{b.ScratchDevice, b.ModulesDevice} {
		if device != "" {
			known++
		}
	}
	drives, _ := filepath.Glob(filepath.Join(sys, "block/vd*"))
	more := len(drives) > known // which may have any file system
	return map[string]bool{
		"failover": !kinds[virtioNet], "net_failover": !kinds[virtioNet], "virtio_net": !kinds[virtioNet],
		"vsock": !kinds[virtioVsock], "vmw_vsock_virtio_transport_common": !kinds[virtioVsock],
		"vmw_vsock_virtio_transport": !kinds[virtioVsock],
		"rng_core":                   !kinds[virtioRNG], "virtio_rng": !kinds[virtioRNG],
		"virtio_balloon": !kinds[virtioBalloon],
		"squashfs":       b.RootType != guest.Squashfs && !more, "erofs": b.RootType != guest.Erofs && !more,
		"overlay": b.ScratchDevice == "",
	}
}

func insertModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// readModuleList reads absolute paths, one a line.
func readModuleList(r io.Reader) (modules, error) {
	var paths modules
	s := bufio.NewScanner(io.LimitReader(r, maxModuleList+1))
	size := 0
	for s.Scan() {
		size += len(s.Bytes()) + 1
		switch p := s.Text(); {
		case size > maxModuleList:
			return nil, fmt.Errorf("more than %d bytes", maxModuleList)
		case p == "":
		case p[0] != '/' || path.Clean(p) != p || strings.Contains(p, "\x00"):
			return nil, fmt.Errorf("%q is no path of a module", p)
		default:
			paths = append(paths, p)
		}
	}
	return paths, s.Err()
}

// findBoot looks at all drives that are small enough. A drive of the image that pretends to be ours
// does not make it past this: then there are two.
func findBoot(sys, dev string) (*guest.Boot, error) {
	drives, err := filepath.Glob(filepath.Join(sys, "vd*"))
	if err != nil {
		return nil, err
	}
	var found *guest.Boot
	var at string
	for _, drive := range drives {
		name := filepath.Base(drive)
		text, err := os.ReadFile(filepath.Join(drive, "size"))
		if err != nil {
			return nil, err
		}
		sectors, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err != nil || sectors > guest.MaxSize/sectorSize {
			continue
		}
		b, err := readBoot(filepath.Join(dev, name))
		switch {
		case errors.Is(err, guest.ErrNoBoot) || errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, fmt.Errorf("drive %s: %w", name, err)
		case found != nil:
			return nil, fmt.Errorf("drives %s and %s both have one", at, name)
		default:
			found, at = b, name
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%w on any drive of at most %d bytes: %w", guest.ErrNoBoot, guest.MaxSize, errNotYet)
	}
	return found, nil
}

func readBoot(device string) (*guest.Boot, error) {
	f, err := os.Open(device)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return guest.Decode(f)
}

// filesystem is a mount to make. The source defaults to the kind.
type filesystem struct {
	kind, source, target string
	flags                uintptr
	data                 string
}

// mount mounts f, on a directory that it makes where there is none.
func mount(f filesystem) error {
	err := os.MkdirAll(f.target, 0o755)
	if err == nil {
		err = unix.Mount(cmp.Or(f.source, f.kind), f.target, f.kind, f.flags, f.data)
	}
	if err != nil {
		return fmt.Errorf("mount %s on %s: %w", strings.TrimSpace(f.kind+" "+f.source), f.target, err)
	}
	return nil
}

// Where the layers are put together, in the initramfs.
const (
	newRoot    = "/root"
	lowerDir   = "/lower"
	scratchDir = "/scratch"
)

// mountRoot mounts on newRoot what will be the guest's root directory.
func (g *system) mountRoot(b *guest.Boot) error {
	if err := awaitDevice(b.RootDevice); err != nil {
		return err
	}
	if b.ScratchDevice != "" {
		return g.joinScratch(b)
	}
	readOnly, err := os.ReadFile(filepath.Join("/sys/class/block", filepath.Base(b.RootDevice), "ro"))
	if err != nil {
		return fmt.Errorf("look at drive %s: %w", b.RootDevice, err)
	}
	if b.RootType != guest.Ext4 || strings.TrimSpace(string(readOnly)) != "0" {
		return mountReadOnly(b, newRoot)
	}
	if err := mount(filesystem{kind: b.RootType, source: b.RootDevice, target: newRoot}); err != nil {
		return err
	}
	return g.keepWritable(newRoot)
}

func mountReadOnly(b *guest.Boot, target string) error {
	f := filesystem{kind: b.RootType, source: b.RootDevice, target: target, flags: unix.MS_RDONLY}
	if b.RootType == guest.Ext4 {
		// Without this a journal that was left unfinished would have to be played back, which needs a
		// writable drive.
		f.data = "noload"
		if mount(f) == nil {
			return nil
		}
		f.data = ""
	}
	return mount(f)
}

// joinScratch lays the scratch over the root. Their own mounts are detached then: the overlay holds
// the layers, and the image sees neither.
func (g *system) joinScratch(b *guest.Boot) error {
	if err := awaitDevice(b.ScratchDevice); err != nil {
		return err
	}
	if err := mountReadOnly(b, lowerDir); err != nil {
		return err
	}
	if err := mount(
		filesystem{
			kind: guest.Ext4, source: b.ScratchDevice, target: scratchDir,
			data: disk.Options("/sys", b.ScratchDevice),
		}); err != nil {
		return err
	}
	upper, work := filepath.Join(scratchDir, guest.UpperDir), filepath.Join(scratchDir, "work")
	for _, dir := range []string{upper, work} {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	hide(lowerDir, upper, "lost+found")
	err := mount(
		filesystem{kind: "overlay", target: newRoot, data: "lowerdir=" + lowerDir + ",upperdir=" + upper +
			",workdir=" + work})
	switch {
	case err == nil:
		err = g.keepWritable(scratchDir)
	case errors.Is(err, unix.ENODEV):
		say("%v: the kernel has no overlayfs, the root stays read-only", err)
		err = mount(filesystem{source: lowerDir, target: newRoot, flags: unix.MS_BIND})
	}
	return errors.Join(err, detach(lowerDir), detach(scratchDir))
}

// hide puts into the upper layer that an empty directory of the lower one is not there: that of
// ext4 is no image's.
func hide(lower, upper, name string) {
	if entries, err := os.ReadDir(filepath.Join(lower, name)); err == nil && len(entries) == 0 {
		_ = unix.Mknod(filepath.Join(upper, name), unix.S_IFCHR, 0) // a guest may have made its own there
	}
}

func detach(target string) error {
	if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// keepWritable remembers the file system that is mounted at target for makeReadOnly.
func (g *system) keepWritable(target string) error {
	fd, err := unix.Open(target, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", target, err)
	}
	g.writable = append(g.writable, fd)
	return nil
}

// makeReadOnly finishes a file system's journal. Unlike mount(2), fspick(2) does not mind that it
// is mounted nowhere.
func makeReadOnly(fd int) error {
	context, err := unix.Fspick(fd, "", unix.FSPICK_EMPTY_PATH|unix.FSPICK_CLOEXEC)
	if err == nil {
		err = unix.FsconfigSetFlag(context, "ro")
	}
	if err == nil {
		err = unix.FsconfigReconfigure(context)
	}
	if err != nil {
		return fmt.Errorf("make the writable drive read-only: %w", err)
	}
	return nil
}

// switchRoot makes newRoot the root directory, and frees the memory of the initramfs. Our own
// program stays, like any that is running.
func switchRoot() error {
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err != nil {
		return fmt.Errorf("look at the initramfs: %w", err)
	}
	if st.Type != unix.RAMFS_MAGIC && st.Type != unix.TMPFS_MAGIC {
		return errors.New("switch root: / is no initramfs")
	}
	if err := errors.Join(detach("/sys"), detach("/dev"), detach("/proc")); err != nil {
		return err
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if p := "/" + e.Name(); p != newRoot {
			_ = os.RemoveAll(p) // what stays takes memory and nothing else
		}
	}
	for _, step := range []func() error{
		func() error { return unix.Chdir(newRoot) },
		func() error { return unix.Mount(".", "/", "", unix.MS_MOVE, "") },
		func() error { return unix.Chroot(".") },
		func() error { return unix.Chdir("/") },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("switch root: %w", err)
		}
	}
	return nil
}

// mountDefaults mounts in the image what every system has, and names the guest.
func mountDefaults(b *guest.Boot) error {
	const safe = unix.MS_NOSUID | unix.MS_NODEV
	needed := []filesystem{
		{kind: "proc", target: "/proc", flags: safe | unix.MS_NOEXEC},
		{kind: "sysfs", target: "/sys", flags: safe | unix.MS_NOEXEC},
		{kind: "devtmpfs", target: "/dev", flags: unix.MS_NOSUID, data: "mode=755"},
	}
	for _, f := range needed {
		if err := mount(f); err != nil {
			return err
		}
	}
	// An init makes what it wants there itself, and takes what an earlier one has left for its own.
	own := fill.Options{Directories: b.HasInit(), Skip: []string{"smartvm"}} // where we mount, see volumes.go
	if own.Directories {
		own.Skip = append(own.Skip, "systemd", "udev")
	}
	without(mountOver(filesystem{kind: "tmpfs", target: "/run", flags: safe, data: "mode=755"}, own))
	usual := []filesystem{
		{kind: "tmpfs", target: "/dev/shm", flags: safe, data: "mode=1777"},
		{kind: "devpts", target: "/dev/pts", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "mode=620,gid=5,ptmxmode=666"},
	}
	if !b.HasInit() {
		usual = append(usual, filesystem{kind: "cgroup2", target: "/sys/fs/cgroup", flags: safe | unix.MS_NOEXEC})
	}
	for _, f := range usual {
		without(mount(f))
	}
	if b.ModulesDevice != "" {
		err := mountModules(b.ModulesDevice)
		if err == nil && !b.HasInit() { // which takes our place
			err = modprobe.Offer()
		}
		without(err)
	}
	for name, target := range map[string]string{"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"} {
		_ = os.Symlink("/proc/self/fd"+target, "/dev/"+name)
	}
	without(loopback())
	setNetwork(b)
	if b.Hostname != "" {
		if err := unix.Sethostname([]byte(b.Hostname)); err != nil {
			return fmt.Errorf("set host name: %w", err)
		}
	}
	for _, err := range nameGuest(b) {
		say("%v", err)
	}
	return nil
}

// mountOver mounts f over a directory, and brings into it what the image has there. What cannot be
// brought is said.
func mountOver(f filesystem, o fill.Options) error {
	from, missing := os.OpenRoot(f.target)
	if missing == nil {
		defer from.Close()
	}
	if err := mount(f); err != nil || missing != nil {
		return err // there is nothing to bring
	}
	to, err := os.OpenRoot(f.target)
	if err == nil {
		err = errors.Join(fill.Copy(to, from, o), to.Close())
	}
	if err != nil {
		say("fill %s with what the image has there: %v", f.target, err)
	}
	return nil
}

// mountModules puts the modules of the kernel that runs where modprobe looks for them.
func mountModules(device string) error {
	var u unix.Utsname
	if err := errors.Join(unix.Uname(&u), awaitDevice(device)); err != nil {
		return err
	}
	return mount(filesystem{
		kind: guest.Ext4, source: device, target: "/lib/modules/" + unix.ByteSliceToString(u.Release[:]),
		flags: unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV, data: "noload",
	})
}

func rewrite(path, text string) error {
	// an image's FIFO does not hold us up
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NONBLOCK, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// loopback lets the guest speak to itself: localhost is there without any other network.
func loopback() (err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		var lo *unix.Ifreq
		if lo, err = unix.NewIfreq("lo"); err == nil {
			lo.SetUint16(unix.IFF_UP)
			err = unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
		}
	}
	if err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}
