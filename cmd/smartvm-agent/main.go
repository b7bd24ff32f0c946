// Command smartvm-agent is the first program of a guest: /init of the initramfs that smartvm gives to images. Beside an
// image's own init it runs on as two processes that serve the host.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"push.rocks/smartvm/internal/guestagent"
)

func main() {
	child := make(chan os.Signal, 1)
	signal.Notify(child, syscall.SIGCHLD)
	if err := run(child); err != nil {
		fmt.Fprintln(os.Stderr, "smartvm-agent:", err)
		os.Exit(1)
	}
}

func run(child <-chan os.Signal) error {
	if len(os.Args) == 2 && os.Args[1] == guestagent.KeepVerb {
		return guestagent.Keep()
	}
	if len(os.Args) == 2 && os.Args[1] == guestagent.ServeVerb {
		return guestagent.Serve(child)
	}
	stop := make(chan os.Signal, 1)
	// The end of process 1 would be the end of the kernel: whatever may end a Go program is caught, and of no consequence.
	signal.Notify(make(chan os.Signal, 1))
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	return guestagent.Main(guestagent.Signals{Stop: stop, Child: child})
}
