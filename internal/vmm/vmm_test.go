package vmm_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/vmm"
)

func TestConfig_Argv(t *testing.T) {
	tests := []struct {
		name   string
		config vmm.Config
		want   string
		root   string
	}{
		{
			"direct",
			vmm.Config{ID: "vm-1", Binary: "/usr/bin/firecracker", Dir: "/run/vm-1/run", Cgroup: "/cgroup/smartvm/vm-1-ab"},
			"/usr/bin/firecracker --id vm-1 --api-sock firecracker.socket --log-path log.fifo --level Warning",
			"/run/vm-1/run/root",
		},
		{
			"direct, talkative",
			vmm.Config{
				ID: "vm-1", Binary: "/usr/bin/firecracker", Dir: "/run/vm-1/run",
				Log: vmm.LogOptions{Level: "Debug", ShowLevel: true, ShowOrigin: true},
			},
			"/usr/bin/firecracker --id vm-1 --api-sock firecracker.socket --log-path log.fifo --level Debug --show-level --show-log-origin",
			"/run/vm-1/run/root",
		},
		{
			"jailed",
			vmm.Config{
				ID: "vm-1", Binary: "/usr/bin/firecracker-v1", Dir: "/run/vm-1/run", Cgroup: "/cgroup/smartvm/vm-1-ab",
				Jailer: &vmm.Jailer{Binary: "/usr/bin/jailer", UID: 1234},
			},
			"/usr/bin/jailer --id vm-1 --exec-file /usr/bin/firecracker-v1 --uid 1234 --gid 1234 --chroot-base-dir /run/vm-1/run/jail" +
				" -- --api-sock firecracker.socket --log-path log.fifo --level Warning",
			"/run/vm-1/run/jail/firecracker-v1/vm-1/root",
		},
		{
			"jailed without a group",
			vmm.Config{
				ID: "vm-1", Binary: "/usr/bin/firecracker", Dir: "/run/vm-1/run",
				Jailer: &vmm.Jailer{Binary: "/usr/bin/jailer", UID: 1234},
				Log:    vmm.LogOptions{Level: "Off"}, PCI: true,
			},
			"/usr/bin/jailer --id vm-1 --exec-file /usr/bin/firecracker --uid 1234 --gid 1234 --chroot-base-dir /run/vm-1/run/jail" +
				" -- --api-sock firecracker.socket --log-path log.fifo --level Off --enable-pci",
			"/run/vm-1/run/jail/firecracker/vm-1/root",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(strings.Fields(tt.want), tt.config.Argv()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if got := tt.config.Root(); got != tt.root {
				t.Errorf("root %s, want %s", got, tt.root)
			}
		})
	}
}

// program writes a shell script.
func program(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestVersion(t *testing.T) {
	for _, tt := range []struct {
		name, script string
		want         firecracker.Version
		err          string
	}{
		{"plain", "echo Firecracker v1.12.1", firecracker.Version{Major: 1, Minor: 12, Patch: 1}, ""},
		{"and a log line", "echo Firecracker v1.7.0; echo; echo exiting", firecracker.Version{Major: 1, Minor: 7}, ""},
		{"development", "echo Firecracker v1.17.0-dev", firecracker.Version{Major: 1, Minor: 17}, ""},
		{"errors aside", "echo oh >&2; echo Firecracker v1.7.0", firecracker.Version{Major: 1, Minor: 7}, ""},
		{"asked rightly", `[ "$*" = --version ] && echo Firecracker v1.7.0`, firecracker.Version{Major: 1, Minor: 7}, ""},
		{
			"nothing of ours inherited", `[ -z "$HOME" ] && echo Firecracker v1.7.0`,
			firecracker.Version{Major: 1, Minor: 7},
			"",
		},
		{"the jailer", "echo Jailer v1.12.1", firecracker.Version{}, "want \"Firecracker"},
		{"silent", "", firecracker.Version{}, "--version"},
		{"garbage", `printf '\033[31m\0\377'`, firecracker.Version{}, "--version"},
		{"endless first line", "head -c 10000000 /dev/zero", firecracker.Version{}, "--version"},
		{"no number", "echo Firecracker vNext", firecracker.Version{}, "vNext"},
		{"fails", "echo Firecracker v1.12.1; exit 3", firecracker.Version{}, "exit status 3"},
		{"dies", "kill -9 $$", firecracker.Version{}, "killed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := vmm.Version(t.Context(), program(t, tt.script))
			if got != tt.want || (err == nil) != (tt.err == "") {
				t.Fatalf("%v, %v, want %v", got, err, tt.want)
			}
			if err == nil {
				return
			}
			if !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), "/program --version") {
				t.Errorf("error %q lacks %q", err, tt.err)
			}
			if strings.ContainsAny(err.Error(), "\x1b\x00") || len(err.Error()) > 1000 {
				t.Errorf("error %.2000q is not for a terminal", err)
			}
		})
	}
	if _, err := vmm.Version(t.Context(), filepath.Join(t.TempDir(), "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no program: %v", err)
	}
}

func TestSnapshotFormat(t *testing.T) {
	for name, tt := range map[string]struct{ script, want, err string }{
		"PlainAsReal":  {`[ "$*" = --snapshot-version ] && printf 'v6.0.0\n2026-12-01T08:40:31 [anonymous-instance:main] Firecracker exiting\n'`, "6.0.0", ""},
		"OneLine":      {"echo v11.0.0", "11.0.0", ""},
		"NoSuchOption": {"echo 'Arguments parsing error'; exit 153", "", "exit status 153"},
		"Silent":       {"", "", "--snapshot-version"},
		"Words":        {"echo Supported snapshot data format versions: v0.23.0", "", "--snapshot-version"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := vmm.SnapshotFormat(t.Context(), program(t, tt.script))
			if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q, %v, want %q and an error with %q", got, err, tt.want, tt.err)
			}
		})
	}
}

// What the real one answers.
func TestReal_SnapshotFormat(t *testing.T) {
	path := testenv.Firecracker(t)
	version, err := vmm.Version(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	format, err := vmm.SnapshotFormat(t.Context(), path)
	if want := map[int]string{
		12: "6.0.0", 13: "8.0.0", 14: "8.0.0", 15: "9.0.0",
		16: "10.0.0",
	}[version.Minor]; err != nil || format != want {
		t.Errorf("Firecracker %s: format %q, %v, want %q", version, format, err, want)
	}
}

// A program that hangs, or talks without end, is left when the caller leaves.
func TestVersion_Endless(t *testing.T) {
	for name, script := range map[string]string{
		"hangs":  "exec sleep 1000",
		"floods": "while :; do echo Firecracker v1.12.1; done",
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errGone)
			defer cancel()
			if v, err := vmm.Version(ctx, program(t, script)); !errors.Is(err, errGone) {
				t.Errorf("%v, %v, want %v", v, err, errGone)
			}
		})
	}
}
