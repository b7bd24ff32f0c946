// Package testenv says what a test can expect of the machine it runs on, finds
// its fixtures and watches for what it leaves behind ([NoLeaks]).
//
// Tests of real Linux guests call Require(t, LinuxGuest), and their names begin
// with TestLinux. Where this machine's KVM boots no Linux, internal/tools/testrun
// runs them in the emulated host of internal/lab, without the race detector,
// which emulation would slow down too much.
//
// A test that needs what the machine has not is skipped, with the reason. For
// the capabilities listed in SMARTVM_REQUIRE, as in "kvm,root,lab", it fails
// instead, so that nothing goes untested unnoticed.
package testenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/lab"
)

// Capability is something that a test needs.
type Capability string

const (
	// KVM: /dev/kvm can be opened and is KVM. It need not boot Linux.
	KVM Capability = "kvm"
	// Root: we are root.
	Root Capability = "root"
	// Lab: the emulated host can be run: its fixtures are here, and we are
	// not in it already.
	Lab Capability = "lab"
	// LinuxGuest: ordinary Linux guests boot here. So they do in the lab.
	LinuxGuest Capability = "linux"
)

// RequireVariable lists the capabilities without which tests fail.
const RequireVariable = "SMARTVM_REQUIRE"

// Require skips the test, or fails it, unless the machine has all of these.
func Require(t testing.TB, capabilities ...Capability) {
	t.Helper()
	for _, c := range capabilities {
		if err := probe(c); err != nil {
			missing(t, c, err)
		}
	}
}

func probe(c Capability) error {
	switch c {
	case KVM:
		return lab.CheckKVM()
	case Root:
		if os.Geteuid() != 0 {
			return fmt.Errorf("we are user %d", os.Geteuid())
		}
		return nil
	case Lab:
		if InLab() {
			return errors.New("this is the lab")
		}
		_, err := labConfig()
		return err
	case LinuxGuest:
		if InLab() {
			return nil
		}
		d, err := lab.Decide(lab.Mode(os.Getenv("SMARTVM_LAB")))
		if err == nil && d.Lab {
			err = errors.New(d.Reason)
		}
		return err
	}
	return fmt.Errorf("capability %q is unknown", c)
}

// missing ends the test for want of a capability.
func missing(t testing.TB, c Capability, reason error) {
	t.Helper()
	must, err := required()
	if err != nil {
		t.Fatal(err)
	}
	if c == LinuxGuest && !strings.HasPrefix(t.Name(), "TestLinux") {
		t.Fatalf("%s needs real Linux guests: its name must begin with TestLinux, or it runs nowhere", t.Name())
	}
	if slices.Contains(must, c) {
		t.Fatalf("%s is missing, and %s asks for it: %v", c, RequireVariable, reason)
	}
	t.Skipf("%s is missing: %v", c, reason)
}

// required parses RequireVariable.
func required() ([]Capability, error) {
	var list []Capability
	for name := range strings.SplitSeq(os.Getenv(RequireVariable), ",") {
		c := Capability(strings.TrimSpace(name))
		switch c {
		case "":
			continue
		case KVM, Root, Lab, LinuxGuest:
			list = append(list, c)
		default:
			return nil, fmt.Errorf("%s: capability %q is unknown", RequireVariable, c)
		}
	}
	return list, nil
}

// InLab says whether we run in the emulated host.
func InLab() bool { return os.Getenv(lab.InLabVariable) == "1" }

// Fixture returns a fixture's path. It does not fetch: where it is missing, the
// capability that it belongs to is missing.
func Fixture(t testing.TB, name fixtures.Name) string {
	t.Helper()
	path, err := lookup(name)
	if err == nil {
		return path
	}
	owner := map[fixtures.Name]Capability{
		fixtures.GuestKernel: LinuxGuest, fixtures.GuestModules: LinuxGuest, fixtures.Busybox: LinuxGuest,
		fixtures.LabKernel: Lab, fixtures.LabModules: Lab, fixtures.QEMU: Lab, fixtures.MkfsBtrfs: Lab,
		fixtures.Umoci: Lab, fixtures.Skopeo: Lab, fixtures.Bzip2: Lab, fixtures.XZ: Lab, fixtures.Zstd: Lab,
		fixtures.Mksquashfs: Lab,
		fixtures.Depmod:     LinuxGuest, fixtures.MkfsXFS: Lab, fixtures.MkfsExt4: Lab, fixtures.NFT: Lab,
		fixtures.IPTables: Lab,
		fixtures.Minimal:  Lab, fixtures.Debian: Lab, fixtures.OpenRC: Lab, fixtures.Docker: Lab,
	}[name]
	if owner == "" {
		owner = KVM
	}
	missing(t, owner, err)
	return ""
}

// Firecracker returns the path of a real Firecracker: $SMARTVM_FIRECRACKER or
// that of the fixtures.
func Firecracker(t testing.TB) string {
	t.Helper()
	return Fixture(t, fixtures.Firecracker)
}

// Jailer returns the path of the jailer that belongs to Firecracker's.
func Jailer(t testing.TB) string {
	t.Helper()
	return Fixture(t, fixtures.Jailer)
}

func lookup(name fixtures.Name) (string, error) {
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return "", err
	}
	path, err := cache.Lookup(context.Background(), name)
	if errors.Is(err, fixtures.ErrMissing) {
		err = fmt.Errorf("%w (to get it: go run ./internal/tools/fixtures %s)", err, name)
	}
	return path, err
}

// LabConfig returns a lab without a command, the working directory ours.
func LabConfig(t testing.TB) lab.Config {
	t.Helper()
	Require(t, Lab)
	c, err := labConfig()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func labConfig() (c lab.Config, err error) {
	for name, to := range map[fixtures.Name]*string{
		fixtures.QEMU: &c.QEMU, fixtures.LabKernel: &c.Kernel, fixtures.LabModules: &c.Modules, fixtures.Busybox: &c.Busybox,
	} {
		path, lookupErr := lookup(name)
		*to = path
		err = errors.Join(err, lookupErr)
	}
	if err != nil {
		return lab.Config{}, err
	}
	c.Dir, err = os.Getwd()
	return c, err
}
