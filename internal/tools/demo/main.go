// Command demo boots a Linux guest with a busybox userland by way of the smartvm command beside it, shows what
// it prints as it arrives, and checks that nothing of it is left. Where this machine's KVM boots no Linux, it does so
// in the emulated host.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/lab"
	"push.rocks/smartvm/internal/testenv/leak"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	run := prepare
	if os.Getenv(lab.InLabVariable) != "" || len(os.Args) > 1 {
		run = boot
	}
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// prepare gets all that the demonstration needs and chooses where it runs.
func prepare(ctx context.Context) error {
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return err
	}
	cache.Messages = os.Stderr
	decision, err := lab.Decide(lab.Mode(os.Getenv("SMARTVM_LAB")))
	if err != nil {
		return err
	}
	paths, err := cache.Ensure(ctx, fixtures.GuestKernel, fixtures.Busybox, fixtures.Firecracker, fixtures.Jailer)
	if err != nil {
		return err
	}
	bin, err := binDir()
	if err != nil {
		return err
	}
	initrd, err := userland(bin, paths[1])
	if err != nil {
		return err
	}
	command := []string{
		filepath.Join(bin, "demo"), filepath.Join(bin, "smartvm"), "run", "--kernel", paths[0], "--initrd", initrd,
		"--append", "console=ttyS0 quiet reboot=k panic=1", "--memory", "256",
		"--firecracker", paths[2], "--jailer", paths[3],
	}
	if decision.Lab {
		fmt.Printf("The guest runs in an emulated host, which takes half a minute: %s.\n", decision.Reason)
		command = append([]string{filepath.Join(bin, "lab"), "--"}, command...)
	} else {
		fmt.Printf("The guest runs directly on this machine's KVM: %s.\n", decision.Reason)
	}
	return execute(ctx, command)
}

func binDir() (string, error) {
	self, err := os.Executable()
	return filepath.Dir(self), err
}

// script is the guest's init.
const script = `#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
read up idle < /proc/uptime
echo "guest: $(/bin/busybox uname -a)"
echo "guest: userland reached $up s after the kernel's start"
echo "guest: $(/bin/busybox uptime)"
/bin/busybox reboot -f
`

// userland writes an initramfs of busybox and script beside the programs.
func userland(bin, busybox string) (string, error) {
	var a kernel.Archive
	for _, e := range []kernel.Entry{
		{Path: "proc", Mode: fs.ModeDir | 0o555},
		{Path: "dev/console", Mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, Major: 5, Minor: 1},
		{Path: "bin/busybox", Mode: 0o755, HostPath: busybox},
		{Path: "init", Mode: 0o755, Content: []byte(script)},
	} {
		if err := a.Add(e); err != nil {
			return "", err
		}
	}
	path := filepath.Join(bin, "demo.cpio")
	f, err := os.Create(path + atomicfile.TempSuffix)
	if err != nil {
		return "", err
	}
	if err := errors.Join(a.Write(f), f.Close()); err != nil {
		return "", err
	}
	return path, os.Rename(f.Name(), path)
}

// boot runs the smartvm command that prepare made, and compares the host before and after.
func boot(ctx context.Context) error {
	const runtimeDir = "/dev/shm/smartvm-demo"
	before, err := leak.Take(leak.Scope{Roots: []string{runtimeDir}})
	if err != nil {
		return err
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	fmt.Printf("host:  Linux %s", release)
	begun := time.Now()
	if err := execute(ctx, append(os.Args[1:], "--runtime-dir", runtimeDir)); err != nil {
		return err
	}
	fmt.Printf("host:  booted, run and shut down in %.1f s\n", time.Since(begun).Seconds())
	if err := os.RemoveAll(runtimeDir); err != nil {
		return err
	}
	left, err := before.Settle(ctx)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("left behind: %v", left)
	}
	fmt.Println("host:  nothing is left: no process, control group, mount, link, socket or file")
	return nil
}

func execute(ctx context.Context, command []string) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	return cmd.Run()
}
