package firecracker_test

import (
	"context"
	"errors"
	"fmt"
	"net"

	"push.rocks/smartvm/firecracker"
)

// Configure and boot the VM of a process started as `firecracker --api-sock vm.sock`.
func Example() {
	ctx := context.Background()
	dial := func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", "vm.sock")
	}
	vmm := firecracker.New(dial, firecracker.Version{Major: 1, Minor: 12, Patch: 1})
	defer vmm.Close()

	boot := func() error {
		if err := vmm.PutMachineConfig(ctx, firecracker.MachineConfiguration{VCPUCount: 2, MemSizeMiB: 512}); err != nil {
			return err
		}
		if err := vmm.PutBootSource(ctx, firecracker.BootSource{
			KernelImagePath: "vmlinux",
			BootArgs:        "console=ttyS0 reboot=k panic=1",
		}); err != nil {
			return err
		}
		if err := vmm.PutDrive(ctx,
			firecracker.Drive{DriveID: "root", IsRootDevice: true, PathOnHost: "root.ext4"}); err != nil {
			return err
		}
		return vmm.InstanceStart(ctx)
	}
	var refused *firecracker.APIError
	if err := boot(); errors.As(err, &refused) {
		fmt.Println("the VMM says:", refused.Fault)
	}
}

// A field newer than the VMM is refused by name, before anything is sent.
func ExampleCheckVersion() {
	old := firecracker.Version{Major: 1, Minor: 12, Patch: 1}
	err := firecracker.CheckVersion(old, firecracker.NetworkInterface{IfaceID: "eth0", HostDevName: "tap0", MTU: 1400})
	fmt.Println(err)
	fmt.Println(errors.Is(err, firecracker.ErrNotSupported))
	// Output:
	// PUT /network-interfaces: field mtu needs Firecracker 1.16.0 or newer, this is 1.12.1
	// true
}
