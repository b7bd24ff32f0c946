package smartvm_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/image/oci/ocitest"
	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

// tinyImages is a host at s with an image "tiny" and a base image, both of a guest of some dozen
// instructions.
func tinyImages(t *testing.T, s *site) *smartvm.Host {
	t.Helper()
	testenv.Fixture(t, fixtures.MkfsExt4)
	kernel := s.spec("idle").BootSource.KernelImagePath
	dir := t.TempDir() // what images are is there to stay
	rootfs, manifest := filepath.Join(dir, "root.ext4"), filepath.Join(dir, "manifest.json")
	s.options.DataDir = filepath.Join(dir, "data")
	t.Cleanup(func() {
		claims, err := filepath.Glob(filepath.Join(s.options.DataDir, "*/*/users/*"))
		more, _ := filepath.Glob(filepath.Join(s.options.DataDir, "*/*/*/users/*"))
		if err != nil || len(claims)+len(more) > 0 {
			t.Errorf("images are still claimed: %v, %v, %v", claims, more, err)
		}
	})
	if err := volume.Blank(t.Context(), rootfs, "ext4", 16<<20); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf(`{"schemaVersion": 1, "bundleId": "tiny-1", "name": "tiny", "arch": %q, "firecrackerVersion": "v1.12.1", "rootfsType": "ext4",
		"rootfsIsReadOnly": false, "bootArgs": "console=ttyS0", "kernel": {"path": %q}, "rootfs": {"path": %q}}`, "x86_64", kernel, rootfs)
	if err := os.WriteFile(manifest, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s.options.Images.Agent = []byte("no guest here runs it")
	s.options.BaseImages = base.Options{ManifestPath: manifest}
	h := s.open()
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := images.Import(t.Context(),
		image.ImportOptions{Name: "tiny", Kernel: kernel, Rootfs: rootfs}); err != nil {
		t.Fatal(err)
	}
	if _, err := images.Pull(t.Context(), "base:hosted", ""); err != nil {
		t.Fatal(err)
	}
	return h
}

// How a VM gets its root depends on its image, and inspect tells.
func TestImage_Staged(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := tinyImages(t, s)
		for name, want := range map[string]map[string]string{
			"tiny":        {"rootfs": "overlay", "scratch": "sparse-copy"},
			"base:hosted": {"rootfs": "sparse-copy"},
		} {
			m, err := h.Create(t.Context(),
				smartvm.Spec{Image: name, MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128}})
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantState(t, m, smartvm.Running)
			i, err := m.Inspect(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for id, d := range i.Staged {
				got[id] = d.Method
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%s: staged %v, want %v", name, got, want)
			}
			s.stopAndRemove(m)
		}
	})
}

// What is said of an image that is not here, or of what it cannot be told.
func TestImage_Refused(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := tinyImages(t, s)
	size := smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128}
	_, err := h.Create(t.Context(), smartvm.Spec{Image: "nothing", MachineConfig: size})
	if !errors.Is(err, image.ErrNotFound) || !strings.Contains(smartvm.Hint(err), "image pull nothing") {
		t.Errorf("no such image: %v, hint %q", err, smartvm.Hint(err))
	}
	_, err = h.Create(t.Context(), smartvm.Spec{Image: "tiny", Kernel: "base:hosted", MachineConfig: size})
	if !errors.Is(err, image.ErrNoKernel) {
		t.Errorf("the kernel of an image that lends none: %v", err)
	}
	_, err = h.Create(t.Context(), smartvm.Spec{Image: "tiny", WorkingDir: "x", Env: []string{"A"}, MachineConfig: size})
	if err == nil || len(strings.Split(err.Error(), "\n")) != 2 {
		t.Errorf("two things wrong: %v", err)
	}
	if all, err := h.Machines(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("left behind: %v, %v", all, err)
	}
}

// A plan names what the VM would use, and claims nothing.
func TestImage_Plan(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := tinyImages(t, s)
	plan, err := h.Plan(t.Context(), smartvm.Spec{
		Image: "tiny", Command: []string{"echo", "hello"},
		MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"content"`, "hello", `/users/`, `"/drives/rootfs"`, `"/drives/scratch"`,
		`"/drives/guest"`,
	} {
		if !bytes.Contains(plan, []byte(want)) {
			t.Errorf("the plan lacks %s:\n%s", want, plan)
		}
	}
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := images.Remove(t.Context(), "tiny", false); err != nil {
		t.Errorf("after a plan: %v", err)
	}
}

// A VM publishes what its image exposes, each at a port that is chosen when it starts, but for what
// it publishes anyhow.
func TestImage_PublishAll(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := tinyImages(t, s)
	layout := t.TempDir()
	d, err := ocitest.Add(layout, "amd64", ocitest.Mixed(4096, 1))
	if err != nil {
		t.Fatal(err)
	}
	if err := ocitest.Tag(layout, "web", d); err != nil {
		t.Fatal(err)
	}
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := images.Pull(t.Context(), "oci:"+layout+":web", "web"); err != nil {
		t.Fatal(err)
	}
	spec := netSpec(smartvm.Spec{
		Image: "web", Kernel: "tiny", PublishAll: true, Ports: []smartvm.Port{{HostPort: 8443, GuestPort: 443}},
		MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
	}, 1)
	m, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	want := []smartvm.Port{
		{HostPort: 8443, GuestPort: 443},
		{GuestPort: 53, Protocol: "udp"},
		{GuestPort: 80, Protocol: "tcp"},
	}
	if got := m.Spec(); !slices.Equal(got.Ports, want) {
		t.Errorf("got %v, want %v", got.Ports, want)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}
