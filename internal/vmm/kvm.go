package vmm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"push.rocks/smartvm/internal/hint"
)

// CheckKVM says whether VMs can run here at all.
func CheckKVM() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, fs.ErrPermission):
		return hint.Add(fmt.Errorf("use KVM: %w", err),
			"add yourself to the group of /dev/kvm (usermod -aG kvm USER) and log in again")
	case errors.Is(err, fs.ErrNotExist):
		return hint.Add(fmt.Errorf("use KVM: %w", err),
			"switch on virtualization in the firmware (nested virtualization in a VM) and load kvm_intel or kvm_amd")
	}
	return fmt.Errorf("use KVM: %w", err)
}
