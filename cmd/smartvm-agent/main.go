// Command smartvm-agent is the first program of a guest: /init of the initramfs that smartvm gives
// to images. Beside an image's own init it runs on as two processes that serve the host, and where
// an image has no modprobe the kernel runs it in the place of that. In a system that boots by
// itself it is a service:
//
//	smartvm-agent serve
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"push.rocks/smartvm/internal/guestagent"
	"push.rocks/smartvm/internal/guestagent/modprobe"
	"push.rocks/smartvm/internal/guestagent/process"
)

func main() {
	child := make(chan os.Signal, 1)
	signal.Notify(child, syscall.SIGCHLD)
	if ignored := process.Ignored(); len(ignored) > 0 {
		signal.Notify(make(chan os.Signal, 1), ignored...)
	}
	if err := run(child); err != nil {
		fmt.Fprintln(os.Stderr, "smartvm-agent:", err)
		os.Exit(1)
	}
}

func run(child <-chan os.Signal) error {
	if name, ok := modprobe.Asked(os.Args[1:]); ok {
		return modprobe.Load(name)
	}
	if os.Getpid() != 1 {
		verb := ""
		if len(os.Args) == 2 {
			verb = os.Args[1]
		}
		return guestagent.Run(verb, child)
	}
	stop := make(chan os.Signal, 1)
	// Those by which Go knows its own faults: sent by somebody, they are dropped.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	return guestagent.Main(guestagent.Signals{Stop: stop, Child: child})
}
