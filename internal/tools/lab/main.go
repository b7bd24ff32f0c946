// Command lab runs a command in an emulated host whose KVM is complete, with
// this machine's files, and exits with its status. See internal/lab.
//
//	lab [-v] [-share dir]... -- command argument...
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/lab"
)

// ownFailure is the exit status when the command did not run to its end.
const ownFailure = 125

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status, err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		status = ownFailure
	}
	os.Exit(status)
}

func run(ctx context.Context, args []string) (int, error) {
	flags := flag.NewFlagSet("lab", flag.ContinueOnError)
	verbose := flags.Bool("v", false, "show the lab kernel's messages and the time taken")
	memory := flags.Int("m", lab.DefaultMemoryMiB, "memory in `MiB`")
	cpus := flags.Int("c", lab.DefaultCPUs, "`CPUs`")
	var share []string
	flags.Func("share", "`directory` that the lab can write to; may be repeated", func(dir string) error {
		abs, err := filepath.Abs(dir)
		share = append(share, abs)
		return err
	})
	if err := flags.Parse(args); err != nil {
		return 0, err
	}
	if flags.NArg() == 0 {
		return 0, errors.New("no command")
	}
	config, err := configure(ctx)
	if err != nil {
		return 0, err
	}
	config.MemoryMiB, config.CPUs, config.Share, config.Command = *memory, *cpus, share, flags.Args()
	start := time.Now()
	if *verbose {
		config.Console = os.Stderr
		defer func() { fmt.Fprintf(os.Stderr, "lab: %.1f s\n", time.Since(start).Seconds()) }()
	}
	return lab.Run(ctx, config)
}

// configure gets the fixtures and takes over what the command may see of our
// environment.
func configure(ctx context.Context) (lab.Config, error) {
	dir, err := os.Getwd()
	if err != nil {
		return lab.Config{}, err
	}
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return lab.Config{}, err
	}
	cache.Messages = os.Stderr
	c, err := cache.Lab(ctx)
	c.Dir, c.Env, c.Stdout, c.Stderr = dir, environment(os.Environ()), os.Stdout, os.Stderr
	return c, err
}

// environment returns the variables that mean the same in the lab.
func environment(all []string) []string {
	keep := map[string]bool{
		"PATH": true, "HOME": true, "USER": true, "LOGNAME": true, "LANG": true, "LC_ALL": true, "TZ": true,
		"TERM": true, "NO_COLOR": true, "TMPDIR": true, "XDG_CACHE_HOME": true, "GOTRACEBACK": true, "GODEBUG": true,
	}
	var env []string
	for _, e := range all {
		name, _, _ := strings.Cut(e, "=")
		if keep[name] || strings.HasPrefix(name, "SMARTVM_") {
			env = append(env, e)
		}
	}
	return env
}
