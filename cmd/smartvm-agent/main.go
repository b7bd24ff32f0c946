// Command smartvm-agent is the first program of a guest: /init of the initramfs that smartvm gives to images.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"push.rocks/smartvm/internal/guestagent"
)

func main() {
	stop, child := make(chan os.Signal, 1), make(chan os.Signal, 1)
	// The end of process 1 would be the end of the kernel: whatever may end a Go program is caught, and of no consequence.
	signal.Notify(make(chan os.Signal, 1))
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	signal.Notify(child, syscall.SIGCHLD)
	if err := guestagent.Main(guestagent.Signals{Stop: stop, Child: child}); err != nil {
		fmt.Fprintln(os.Stderr, "smartvm-agent:", err)
		os.Exit(1)
	}
}
