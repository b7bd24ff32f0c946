// Command smartvm runs Firecracker microVMs. See smartvm --help.
package main

import (
	"context"
	"math"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/cli"
)

func main() {
	// Whatever our parent left open is no business of the VMs'. Kernels before 5.11 cannot do it.
	_ = unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
	ctx, kill := interrupts()
	os.Exit(cli.Main(ctx, os.Args[1:],
		cli.Process{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Kill: kill, Resized: resizes()}))
}

// resizes tells of the terminal's new sizes.
func resizes() <-chan struct{} {
	c, resized := make(chan os.Signal, 1), make(chan struct{}, 1)
	signal.Notify(c, syscall.SIGWINCH)
	go func() {
		for range c {
			select {
			case resized <- struct{}{}:
			default: // one is to be seen yet
			}
		}
	}()
	return resized
}

// interrupts turns the first signal into the context's end, the second into kill's, and lets the
// third end the process.
func interrupts() (ctx context.Context, kill <-chan struct{}) {
	ctx, cancel := context.WithCancelCause(context.Background())
	now := make(chan struct{})
	c := make(chan os.Signal, 3)
	signal.Notify(c, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) {
		signal.Notify(c, syscall.SIGHUP)
	}
	// A reader that went away is an error of the write, not our end: there is a VM to end first.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	go func() {
		got := cli.Interrupted{Signal: (<-c).(syscall.Signal)}
		cancel(got)
		<-c
		close(now)
		<-c
		os.Exit(got.ExitCode())
	}()
	return ctx, now
}
