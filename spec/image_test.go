package spec_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	vmspec "push.rocks/smartvm/spec"
)

func TestValidate_Image(t *testing.T) {
	good := func() vmspec.Spec {
		return vmspec.Spec{Image: "debian:12", MachineConfig: vmspec.MachineConfig{VCPUCount: 1, MemSizeMiB: 256}}
	}
	if err := good().Validate(); err != nil {
		t.Fatal(err)
	}
	cleared := good()
	cleared.Entrypoint, cleared.Command, cleared.Systemd = []string{}, []string{"id"}, vmspec.SystemdFalse
	if err := cleared.Validate(); err != nil {
		t.Error(err)
	}
	for name, tt := range map[string]struct {
		change func(*vmspec.Spec)
		want   []string // paths, with what is said of them
	}{
		"kernel twice": {func(s *vmspec.Spec) {
			s.Kernel, s.BootSource.KernelImagePath = "host", "vmlinux"
		}, []string{"kernel: cannot be combined"}},
		"second root": {func(s *vmspec.Spec) {
			s.Drives = []vmspec.Drive{{DriveID: "a", PathOnHost: "a", IsRootDevice: true}}
		}, []string{"drives[0].isRootDevice: cannot be a root device too"}},
		"our drive": {func(s *vmspec.Spec) {
			s.Drives = []vmspec.Drive{{DriveID: vmspec.ScratchDrive, PathOnHost: "a"}}
		}, []string{"drives[0].driveId: is the same as image's"}},
		"text": {func(s *vmspec.Spec) {
			s.Command, s.Env, s.WorkingDir = []string{"a\x00"}, []string{"SECRET"}, "tmp"
		}, []string{"command[0]: must not hold a NUL", "env[0]: must be NAME=VALUE", "workingDir: must be absolute"}},
		"nothing to run": {func(s *vmspec.Spec) {
			s.Entrypoint = []string{}
		}, []string{"command: is required where entrypoint is empty: there is nothing to run"}},
		"nothing, docker": {func(s *vmspec.Spec) {
			s.Entrypoint = []string{""}
		}, []string{"command: is required where entrypoint is empty: there is nothing to run"}},
		"nameless program": {func(s *vmspec.Spec) {
			s.Entrypoint, s.Command = []string{"", "-c"}, []string{"a"}
		}, []string{"entrypoint[0]: must be a program's name"}},
		"init": {func(s *vmspec.Spec) { s.Systemd = "yes" }, []string{"systemd: must be one of true, false, always"}},
		"long": {func(s *vmspec.Spec) {
			s.Command = slices.Repeat([]string{strings.Repeat("a", 1000)}, 200)
		}, []string{"command: must be, with entrypoint and env, at most"}},
		"scratch": {func(s *vmspec.Spec) {
			s.Scratch = &vmspec.Scratch{SizeMiB: 1, Keep: "../x"}
		}, []string{"scratch.sizeMib: must be from", "scratch.keep: must be 1 to 64"}},
		"hostname": {func(s *vmspec.Spec) { s.Hostname = "-a" }, []string{"hostname: must be 1 to 64"}},
		"without": {func(s *vmspec.Spec) {
			s.Image, s.BootSource.KernelImagePath = "", "vmlinux"
			s.Kernel, s.Scratch, s.User, s.Command = "k", &vmspec.Scratch{}, "u", []string{"c"}
			s.Entrypoint, s.Systemd = []string{}, vmspec.SystemdAlways
		}, []string{
			"kernel: is only for", "scratch: is only for", "entrypoint: is only for", "systemd: is only for",
			"command: is only for", "user: is only for",
		}},
		"extra hosts": {func(s *vmspec.Spec) {
			s.NetworkInterfaces = []vmspec.NetworkInterface{{IfaceID: "eth0"}}
			s.ExtraHosts = []vmspec.ExtraHost{
				{Name: "db", HostGateway: true},
				{Name: "a b", IP: netip.IPv6Loopback()},
				{Name: "db.", HostGateway: true},
				{Name: "db"},
				{Name: "db", IP: netip.MustParseAddr("fe80::1%eth0")},
				{Name: "db", IP: netip.IPv6Loopback(), HostGateway: true},
			}
		}, []string{
			"extraHosts[1].name: must be a name", "extraHosts[2].name: must be a name",
			"extraHosts[3].ip: must be an IPv4 or IPv6 address", "extraHosts[4].ip: must be",
			"extraHosts[5].hostGateway: must not be there beside ip",
		}},
		"many extra hosts, no network": {func(s *vmspec.Spec) {
			s.ExtraHosts = slices.Repeat([]vmspec.ExtraHost{{Name: "db", HostGateway: true}}, 65)
		}, []string{"extraHosts: must be at most 64", "extraHosts: must not be there without"}},
		"nothing": {func(s *vmspec.Spec) { s.Image = "" }, []string{"bootSource.kernelImagePath: is required"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := good()
			tt.change(&s)
			err := s.Validate()
			if err == nil {
				t.Fatal("it is valid")
			}
			lines := strings.Split(err.Error(), "\n")
			for _, want := range tt.want {
				if !slices.ContainsFunc(lines, func(line string) bool { return strings.HasPrefix(line, want) }) {
					t.Errorf("nothing begins with %q:\n%v", want, err)
				}
			}
			if len(lines) != len(tt.want) || strings.Contains(err.Error(), "SECRET") {
				t.Errorf("want %d problems and no secret:\n%v", len(tt.want), err)
			}
		})
	}
}
