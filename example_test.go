package smartvm_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"time"

	"push.rocks/smartvm"
)

// A VM that is one call's: made, started, awaited and removed.
func ExampleHost_Run() {
	h, err := smartvm.Open(smartvm.Options{})
	if err != nil {
		log.Fatal(err, "; ", smartvm.Hint(err))
	}
	defer h.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // and then the VM ends
	defer cancel()
	exit, err := h.Run(ctx, smartvm.Spec{
		BootSource:    smartvm.BootSource{KernelImagePath: "vmlinux", InitrdPath: "initrd"},
		MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 256},
		Drives:        []smartvm.Drive{{DriveID: "rootfs", PathOnHost: "rootfs.ext4", IsRootDevice: true}},
	}, smartvm.RunOptions{Console: os.Stdout, Stop: smartvm.StopOptions{Timeout: smartvm.DefaultStopTimeout}})
	if err != nil {
		log.Fatal(err, "; ", smartvm.Hint(err))
	}
	fmt.Println("the VM", exit.Outcome)
}

// A VM of several runs, whose copy of its drive lasts from one to the next.
func ExampleHost_Create() {
	ctx := context.Background()
	h, err := smartvm.Open(smartvm.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer h.Close() // leaves VMs running: see Recover
	m, err := h.Create(ctx, smartvm.Spec{
		Name:          "build",
		BootSource:    smartvm.BootSource{KernelImagePath: "vmlinux"},
		MachineConfig: smartvm.MachineConfig{VCPUCount: 2, MemSizeMiB: 1024},
		Drives:        []smartvm.Drive{{DriveID: "rootfs", PathOnHost: "rootfs.ext4", IsRootDevice: true}},
	})
	var wrong *smartvm.FieldError
	switch {
	case errors.As(err, &wrong):
		log.Fatalf("%s: %s", wrong.Path, wrong.Reason)
	case errors.Is(err, smartvm.ErrExists):
		m, err = h.Machine(ctx, "build")
	}
	if err != nil {
		log.Fatal(err)
	}
	if err := m.Start(ctx); err != nil {
		log.Fatal(err)
	}
	how, err := m.Stop(ctx, smartvm.StopOptions{Timeout: smartvm.DefaultStopTimeout})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("ended by", how)
	if err := m.Remove(ctx); err != nil {
		log.Fatal(err)
	}
}

// What a service does as long as it runs: it supervises VMs that other processes leave.
func ExampleHost_Watch() {
	h, err := smartvm.Open(smartvm.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer h.Close()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err = h.Watch(ctx, func(report *smartvm.Report, err error) {
		if err != nil {
			log.Print(err)
			return
		}
		log.Printf("now supervised here: %v", report.Adopted)
	})
	log.Print(err)
}

// What a service does when it starts: it supervises the VMs that an earlier one has left, and
// clears up.
func ExampleHost_Recover() {
	h, err := smartvm.Open(smartvm.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer h.Close()
	report, err := h.Recover(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("run on:", report.Adopted, "ended unsupervised:", report.Recovered, "removed:", report.Removed)
}

// A program in the guest of a VM that runs, with its output.
func ExampleMachine_Exec() {
	ctx := context.Background()
	h, err := smartvm.Open(smartvm.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer h.Close()
	m, err := h.Machine(ctx, "build")
	if err != nil {
		log.Fatal(err)
	}
	exit, err := m.Exec(ctx,
		smartvm.Cmd{Args: []string{"make", "test"}, Dir: "/src", Stdout: os.Stdout, Stderr: os.Stderr})
	if errors.Is(err, smartvm.ErrNoAgent) {
		log.Fatal("its guest has no agent: ", smartvm.Hint(err))
	}
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("exit code", exit.Code)
}

// A VM's state is kept while it runs on, and ten VMs go on from it.
func ExampleSnapshot_Fork() {
	ctx := context.Background()
	h, err := smartvm.Open(smartvm.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer h.Close()
	m, err := h.Machine(ctx, "template")
	if err != nil {
		log.Fatal(err)
	}
	sn, err := m.Snapshot(ctx, smartvm.SnapshotOptions{Name: "ready"})
	if err != nil {
		log.Fatal(err)
	}
	for _, warning := range sn.Warnings {
		log.Print(warning)
	}
	workers, err := sn.Fork(ctx, 10, smartvm.ForkOptions{RestoreOptions: smartvm.RestoreOptions{Name: "worker"}})
	if err != nil {
		log.Fatal(err)
	}
	for _, w := range workers {
		fmt.Println(w.Name()) // worker-1, worker-2, …
	}
}

// What happens on the host, from now on, whichever process does it.
func ExampleHost_Events() {
	h, err := smartvm.Open(smartvm.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer h.Close()
	for e, err := range h.Events(context.Background(), smartvm.EventsNow) {
		var lost *smartvm.LostError
		if errors.As(err, &lost) {
			log.Print(lost) // look at all VMs once
			continue
		}
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(e.ID, e.Type, e.VM, e.Attributes)
	}
}
