package vmflags_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/pflag"

	"push.rocks/smartvm/internal/vmflags"
	"push.rocks/smartvm/spec"
)

func build(t testing.TB, stdin string, args ...string) (spec.Spec, error) {
	t.Helper()
	var f vmflags.Flags
	set := pflag.NewFlagSet("test", pflag.ContinueOnError)
	f.Add(set)
	f.LookupEnv = func(name string) (string, bool) { return "from here", name == "HERE" }
	if err := set.Parse(args); err != nil {
		return spec.Spec{}, err
	}
	return f.Build(strings.NewReader(stdin), nil)
}

func TestBuild(t *testing.T) {
	no := false
	for name, tt := range map[string]struct {
		stdin string
		args  []string
		want  spec.Spec
	}{
		"defaults": {want: spec.Spec{MachineConfig: spec.MachineConfig{VCPUCount: 1, MemSizeMiB: 128}}},
		"everything": {
			args: []string{
				"-k", "vmlinux", "--initrd", "i.cpio", "--append", "quiet", "-c", "4", "-m", "2G", "--name", "web", "--id", "x",
				"-l", "a=b=c", "-l", "empty", "--drive", "a,b", "--vsock", "v.sock,cid=7", "--net", "tap:tap0", "--net",
				"tap:tap1,id=lan,mac=06:00:00:00:00:01",
			},
			want: spec.Spec{
				ID: "x", Name: "web", Labels: map[string]string{"a": "b=c", "empty": ""},
				BootSource:    spec.BootSource{KernelImagePath: "vmlinux", InitrdPath: "i.cpio", BootArgs: "quiet"},
				MachineConfig: spec.MachineConfig{VCPUCount: 4, MemSizeMiB: 2048},
				Drives:        []spec.Drive{{DriveID: "drive0", PathOnHost: "a"}},
				Vsock:         &spec.Vsock{GuestCID: 7, UDSPath: "v.sock"},
				NetworkInterfaces: []spec.NetworkInterface{
					{IfaceID: "eth0", HostDevName: "tap0"},
					{IfaceID: "lan", HostDevName: "tap1", GuestMAC: "06:00:00:00:00:01"},
				},
			},
		},
		"an address and a free port": {
			args: []string{"--net", "lan", "--net", "tap:tap0", "--ip", "10.7.0.9", "-p", "80"},
			want: spec.Spec{
				MachineConfig: spec.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
				NetworkInterfaces: []spec.NetworkInterface{
					{IfaceID: "eth0", Network: "lan", IP: netip.MustParseAddr("10.7.0.9")}, {IfaceID: "eth1", HostDevName: "tap0"},
				},
				Ports: []spec.Port{{GuestPort: 80}},
			},
		},
		"an address of each network": {
			args: []string{"--net", "lan,ip=10.7.0.9", "--net", "bridge", "-P"},
			want: spec.Spec{
				MachineConfig: spec.MachineConfig{VCPUCount: 1, MemSizeMiB: 128}, PublishAll: true,
				NetworkInterfaces: []spec.NetworkInterface{
					{IfaceID: "eth0", Network: "lan", IP: netip.MustParseAddr("10.7.0.9")}, {IfaceID: "eth1", Network: "default"},
				},
			},
		},
		"a file that flags override": {
			stdin: `{"name":"old","machineConfig":{"vcpuCount":2,"memSizeMib":64},
				"drives":[{"driveId":"drive1","pathOnHost":"one","isRootDevice":true},{"driveId":"data","pathOnHost":"two","isRootDevice":false}]}`,
			args: []string{
				"-f", "-", "-m", "96MiB", "--drive", "three:ro", "--drive", "four:rw,id=data,root,ephemeral=false",
				"--drive", "five",
			},
			want: spec.Spec{
				Name: "old", MachineConfig: spec.MachineConfig{VCPUCount: 2, MemSizeMiB: 96},
				Drives: []spec.Drive{
					{DriveID: "drive1", PathOnHost: "one", IsRootDevice: true},
					{DriveID: "data", PathOnHost: "four", IsRootDevice: true, Ephemeral: &no},
					{DriveID: "drive0", PathOnHost: "three", IsReadOnly: true},
					{DriveID: "drive2", PathOnHost: "five"},
				},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := build(t, tt.stdin, tt.args...)
			if name == "everything" && err != nil { // "--drive a,b" has an option that there is not
				if got, want := err.Error(), `--drive a,b: unknown option "b"`; got != want {
					t.Errorf("got %q, want %q", got, want)
				}
			} else if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestBuild_Entrypoint(t *testing.T) {
	const file = `{"image":"a","machineConfig":{"vcpuCount":1,"memSizeMib":64},"entrypoint":["/e","-c"],"command":["id"],"systemd":"always"}`
	for name, tt := range map[string]struct {
		args []string
		want []string
	}{
		"the file's": {nil, []string{"/e", "-c"}},
		"another":    {[]string{"--entrypoint", "/bin/ls"}, []string{"/bin/ls"}},
		"none":       {[]string{"--entrypoint", ""}, []string{}},
	} {
		got, err := build(t, file, append([]string{"-f", "-"}, tt.args...)...)
		if diff := cmp.Diff(tt.want, got.Entrypoint); diff != "" || err != nil {
			t.Errorf("%s: %v, -want +got:\n%s", name, err, diff)
		}
		if got.Systemd != spec.SystemdAlways {
			t.Errorf("%s: systemd is %q, want what the file says", name, got.Systemd)
		}
	}
	if got, err := build(t, "", "--systemd", "false"); err != nil || got.Systemd != spec.SystemdFalse ||
		got.Entrypoint != nil {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestBuild_Env(t *testing.T) {
	got, err := build(t, `{"image":"a","machineConfig":{"vcpuCount":1,"memSizeMib":64},"env":["FILE=1"]}`, "-f", "-", "-e",
		"A=1", "-e", "HERE", "-e", "NOWHERE")
	if diff := cmp.Diff([]string{"FILE=1", "A=1", "HERE=from here"}, got.Env); diff != "" || err != nil {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
	if _, err := build(t, "", "-e", "A=1", "-e", "=x"); err == nil ||
		!strings.HasPrefix(err.Error(), "-e: variable 2 has no name") {
		t.Errorf("got %v", err)
	}
}

func TestBuild_ExtraHosts(t *testing.T) {
	six := netip.MustParseAddr("2001:db8::7")
	got, err := build(t, "", "--add-host", "a.example:192.0.2.7", "--add-host", "b:2001:db8::7", "--add-host",
		"c=[2001:db8::7]", "--add-host", "d:::1",
		"--add-host", "host.docker.internal:host-gateway")
	want := []spec.ExtraHost{
		{Name: "a.example", IP: netip.MustParseAddr("192.0.2.7")},
		{Name: "b", IP: six},
		{Name: "c", IP: six},
		{Name: "d", IP: netip.IPv6Loopback()},
		{Name: "host.docker.internal", HostGateway: true},
	}
	if diff := cmp.Diff(want, got.ExtraHosts, cmpopts.EquateComparable(netip.Addr{})); diff != "" || err != nil {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
	_, err = build(t, "", "--add-host", "a", "--add-host", ":192.0.2.7", "--add-host", "a:b", "--add-host", "192.0.2.7",
		"--add-host", "::1")
	for _, text := range []string{"a", ":192.0.2.7", "a:b", "192.0.2.7", "::1"} {
		if want := "--add-host \"" + text + "\": want NAME:IP"; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestBuild_File(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.json")
	if _, err := build(t, "", "-f", path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: got %v", err)
	}
	if err := os.WriteFile(path, []byte(`{"flavour":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := build(t, "", "-f", path)
	if e, ok := errors.AsType[*spec.FieldError](err); !ok || e.Path != "flavour" {
		t.Errorf("got %v, want the field", err)
	}
	// A file without an end is not read to it.
	if _, err := build(t, strings.Repeat(" ", 4*spec.MaxBytes), "-f", "-"); err == nil {
		t.Error("an endless file was taken")
	}
}

func TestMemory(t *testing.T) {
	for text, want := range map[string]int{
		"128": 128, "512M": 512, "512mb": 512, "1MiB": 1, "2G": 2048, "2gib": 2048, "0": 0, "2147483647": 1<<31 - 1,
	} {
		if got, err := build(t, "", "-m", text); err != nil || got.MachineConfig.MemSizeMiB != want {
			t.Errorf("%q: got %d, %v, want %d", text, got.MachineConfig.MemSizeMiB, err, want)
		}
	}
	for _, text := range []string{
		"", "M", "-1", "1.5G", "1K", "1T", "2147483648", "2097152G", "99999999999999999999",
		"1GG", "1 G",
	} {
		if got, err := build(t, "", "-m", text); err == nil {
			t.Errorf("%q was taken for %d MiB", text, got.MachineConfig.MemSizeMiB)
		}
	}
}

func TestSeconds(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"0": 0, "10": 10 * time.Second, "0.5": time.Second / 2,
		"1m30s": 90 * time.Second,
	} {
		var got vmflags.Seconds
		if err := got.Set(text); err != nil || time.Duration(got) != want {
			t.Errorf("%q: got %v, %v, want %v", text, got.String(), err, want)
		}
	}
	for _, text := range []string{"", "-1", "-1s", "soon", "NaN", "Inf", "1e300", "99999999999999999999"} {
		var got vmflags.Seconds
		if err := got.Set(text); err == nil {
			t.Errorf("%q was taken for %v", text, got.String())
		}
	}
}
