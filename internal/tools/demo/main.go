// Command demo boots a Linux guest with a busybox userland by way of the smartvm command beside it,
// runs a command in it ($CMD, for a shell), and checks that nothing of it is left. Where this
// machine's KVM boots no Linux, it does so in the emulated host.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/fixtures"
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
	paths, err := cache.Ensure(ctx, fixtures.GuestKernel, fixtures.GuestModules, fixtures.Minimal, fixtures.Firecracker,
		fixtures.Jailer)
	if err != nil {
		return err
	}
	bin, err := binDir()
	if err != nil {
		return err
	}
	data := filepath.Join(bin, "demo-data")
	smartvm := []string{filepath.Join(bin, "smartvm"), "--data-dir", data, "--firecracker", paths[3], "--jailer", paths[4]}
	if err := quietly(ctx,
		append(slices.Clip(smartvm), "image", "import", "--kernel", paths[0], "--modules", paths[1], "--rootfs", paths[2],
			image)); err != nil {
		return err
	}
	command := append([]string{filepath.Join(bin, "demo"), cmp.Or(os.Getenv("CMD"), "uname -a; uptime")}, smartvm...)
	if decision.Lab {
		fmt.Printf("The guest runs in an emulated host, which takes half a minute: %s.\n", decision.Reason)
		command = append([]string{filepath.Join(bin, "lab"), "-share", data, "--"}, command...)
	} else {
		fmt.Printf("The guest runs directly on this machine's KVM: %s.\n", decision.Reason)
	}
	return execute(ctx, command)
}

func binDir() (string, error) {
	self, err := os.Executable()
	return filepath.Dir(self), err
}

// image is what the guest is of, and what it is called.
const image = "demo"

// boot starts a VM by the smartvm command that prepare made, has the user's command run in it, and
// compares the host before and after.
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
	smartvm := append(slices.Clip(os.Args[2:]), "--runtime-dir", runtimeDir)
	with := func(args ...string) []string { return append(slices.Clip(smartvm), args...) }
	begun := time.Now()
	err = quietly(ctx,
		with("run", "-d", "--name", image, "--net", "none", "--scratch", "64M", image, "--", "sh", "-c",
			"while :; do sleep 1; done"))
	if err == nil {
		err = quietly(ctx, with("wait", "--for", "ready", image))
		fmt.Printf("host:  the guest was ready after %.1f s\n", time.Since(begun).Seconds())
	}
	if err == nil {
		fmt.Printf("guest: %s\n", os.Args[1])
		err = execute(ctx, with("exec", image, "--", "sh", "-c", os.Args[1]))
	}
	// After Ctrl-C too.
	if err := errors.Join(err, quietly(context.WithoutCancel(ctx), with("rm", "-f", image))); err != nil {
		return err
	}
	fmt.Printf("host:  booted, used and removed in %.1f s\n", time.Since(begun).Seconds())
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

// quietly shows what a command says only when it goes wrong.
func quietly(ctx context.Context, command []string) error {
	out, err := exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(command, " "), err, out)
	}
	return nil
}
