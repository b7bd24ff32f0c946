package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/internal/kernel"
)

// variant is what a lab and the guests in it have that others have not: values by setting.
type variant map[string][]string

// settings lists those that there are. The command's documentation explains them.
func settings() []string {
	return []string{
		"default", "qemu", "cpus", "memory", "accel", "cpu", "kernel", "kvm_amd", "sys", "guest", "device", "no-serial",
		"guest-memory", "pages",
	}
}

// device is one that a guest can have.
type device struct {
	key    string // in the VMM's configuration
	config map[string]any
	driver string
}

func devices() map[string]device {
	return map[string]device{
		"vsock":   {"vsock", map[string]any{"guest_cid": 3, "uds_path": socketPath}, "vmw_vsock_virtio_transport"},
		"balloon": {"balloon", map[string]any{"amount_mib": 0, "deflate_on_oom": true}, "virtio_balloon"},
		"rng":     {"entropy", map[string]any{}, "virtio-rng"},
	}
}

// socketPath is where the VMM has the vsock device's socket: in the lab, as the files it shares
// cannot be sockets.
const socketPath = "/run/labrows-vsock"

func parseVariant(text string) (variant, error) {
	v := variant{}
	for _, word := range strings.Fields(text) {
		key, value, _ := strings.Cut(word, "=")
		if !slices.Contains(settings(), key) || key == "device" && devices()[value].key == "" {
			return nil, fmt.Errorf("variant %q: there is no %q", text, word)
		}
		v[key] = append(v[key], value)
	}
	return v, nil
}

// last returns a setting's last value.
func (v variant) last(key, otherwise string) string {
	if all := v[key]; len(all) > 0 {
		return all[len(all)-1]
	}
	return otherwise
}

// number returns a setting's last value, a number.
func (v variant) number(key string, otherwise int) (int, error) {
	n, err := strconv.Atoi(v.last(key, strconv.Itoa(otherwise)))
	if err != nil {
		err = fmt.Errorf("setting %s: %w", key, err)
	}
	return n, err
}

// wrapper returns a program that runs QEMU with other arguments than the lab's, and first writes
// its process ID to a file.
func (v variant) wrapper(qemu, pidFile string) []byte {
	replaced := func(key string) string {
		if v[key] == nil {
			return "$word"
		}
		return quote(v.last(key, ""))
	}
	return fmt.Appendf(nil, `#!/bin/sh
echo $$ >%s
for word; do
	shift
	case $last in
	-accel) word=%s ;;
	-cpu) word=%s ;;
	-append) word="$word "%s ;;
	esac
	set -- "$@" "$word"
	last=$word
done
exec %s "$@"
`, quote(pidFile), replaced("accel"), replaced("cpu"), quote(strings.Join(v["kernel"], " ")), quote(qemu))
}

// quote quotes a word for the shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// announcement is what a guest says when its first program runs.
const announcement = "labrows: the guest is up"

// initramfs writes one whose init inserts the devices' drivers, says that it is up and ends the
// guest.
func (v variant) initramfs(path, modules, busybox string) error {
	var names []string
	for _, d := range v["device"] {
		names = append(names, "virtio_mmio", devices()[d].driver)
	}
	var a kernel.Archive
	inserted, err := a.AddModules(os.DirFS(modules), filepath.Base(modules), names...)
	if err != nil {
		return err
	}
	var init strings.Builder
	init.WriteString("#!/bin/busybox sh\n")
	for _, m := range inserted {
		fmt.Fprintf(&init, "/bin/busybox insmod %s\n", m)
	}
	fmt.Fprintf(&init, "/bin/busybox echo %s\n/bin/busybox reboot -f\n", announcement)
	for _, e := range []kernel.Entry{
		{Path: "/init", Mode: 0o755, Content: []byte(init.String())},
		{Path: "/bin/busybox", Mode: 0o755, HostPath: busybox},
		{Path: "/dev/console", Mode: os.ModeDevice | os.ModeCharDevice | 0o600, Major: 5, Minor: 1},
	} {
		if err := a.Add(e); err != nil {
			return err
		}
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(a.Write(f), f.Close())
}

// machine writes the VMM's configuration.
func (v variant) machine(path, vmlinux, initrd, pages string) error {
	args := strings.Fields(image.QuietBootArgs)
	if v["no-serial"] != nil {
		args = append(slices.DeleteFunc(args, func(a string) bool {
			return strings.HasPrefix(a, "console=")
		}), "8250.nr_uarts=0")
	}
	config := map[string]any{"vcpu_count": 1, "mem_size_mib": json.Number(v.last("guest-memory", "256"))}
	if pages := v.last("pages", pages); pages != "none" {
		config["huge_pages"] = pages
	}
	machine := map[string]any{
		"boot-source": map[string]any{
			"kernel_image_path": vmlinux, "initrd_path": initrd, "boot_args": strings.Join(append(args, v["guest"]...), " "),
		},
		"drives":         []any{},
		"machine-config": config,
	}
	for _, d := range v["device"] {
		machine[devices()[d].key] = devices()[d].config
	}
	data, err := json.Marshal(machine)
	if err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}
