package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Mode says who decides where Linux guests run: SMARTVM_LAB, which main
// programs read.
type Mode string

// Modes. The empty Mode is Auto.
const (
	Auto   Mode = "auto"
	Always Mode = "always" // in the lab
	Never  Mode = "never"  // directly
)

// Decision is where microVMs with ordinary Linux guests are to run.
type Decision struct {
	Lab    bool
	Reason string // for people, half a sentence
}

// Decide looks whether this machine's KVM boots an ordinary Linux kernel. It
// returns an error for an unknown mode only.
func Decide(mode Mode) (Decision, error) {
	return decide(mode, "/dev/kvm", "/sys/module/kvm_pvm")
}

func decide(mode Mode, device, pvm string) (Decision, error) {
	switch mode {
	case Always, Never:
		return Decision{Lab: mode == Always, Reason: fmt.Sprintf("asked for: SMARTVM_LAB=%s", mode)}, nil
	case Auto, "":
	default:
		return Decision{}, fmt.Errorf("SMARTVM_LAB is %q: it can be %s, %s or %s", mode, Auto, Always, Never)
	}
	if err := checkKVM(device); err != nil {
		return Decision{Lab: true, Reason: err.Error()}, nil
	}
	if _, err := os.Stat(pvm); err == nil {
		return Decision{Lab: true, Reason: device + " is of the PVM kind, which boots no ordinary Linux kernel"}, nil
	}
	return Decision{Reason: device + " is complete"}, nil
}

// CheckKVM returns why /dev/kvm cannot be used, or nil.
func CheckKVM() error { return checkKVM("/dev/kvm") }

// getAPIVersion is KVM_GET_API_VERSION of linux/kvm.h, and apiVersion what it
// has returned since Linux 2.6.22.
const (
	getAPIVersion = 0xae00
	apiVersion    = 12
)

func checkKVM(device string) error {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("there is no %s: %w", device, fs.ErrNotExist)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("we may not open %s: %w", device, fs.ErrPermission)
	case err != nil:
		return err
	}
	defer f.Close()
	version, err := unix.IoctlRetInt(int(f.Fd()), getAPIVersion)
	if err != nil {
		return fmt.Errorf("%s is not KVM: %w", device, err)
	}
	if version != apiVersion {
		return fmt.Errorf("%s has KVM API version %d, not %d", device, version, apiVersion)
	}
	return nil
}
