// Package cli is the smartvm command line. Each command is a file and a struct of its settings.
//
// What a command gives goes to standard output: the guest's console as it is, else a table, or with
// -o json a document whose fields are stable. All else goes to standard error.
package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cli/disks"
	"push.rocks/smartvm/internal/cli/guest"
	"push.rocks/smartvm/internal/cli/help"
	"push.rocks/smartvm/internal/cli/images"
	"push.rocks/smartvm/internal/cli/snapshots"
	"push.rocks/smartvm/internal/cli/update"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/supervise"
	"push.rocks/smartvm/internal/vmflags"
)

// Process is what a command line finds around it.
type Process struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Kill           <-chan struct{} // closed when the end is wanted at once
	Resized        <-chan struct{} // the terminal has another size
}

// Exit codes other than a guest's own.
const (
	exitUsage  = 2
	exitFailed = 125
	exitSignal = 128 // and the signal's number
)

// Interrupted is the cause of a context that a signal ended.
type Interrupted struct{ Signal syscall.Signal }

func (i Interrupted) Error() string { return "interrupted by " + unix.SignalName(i.Signal) }

// Is makes it a cancellation.
func (i Interrupted) Is(target error) bool { return target == context.Canceled }

// ExitCode is what shells expect of a process that a signal ended.
func (i Interrupted) ExitCode() int { return exitSignal + int(i.Signal) }

// Main runs one command line, without the program's name, and returns the process's exit code.
func Main(ctx context.Context, args []string, p Process) int {
	a := &app{Process: p}
	err := a.execute(ctx, args)
	var status exitStatus
	if err == nil || errors.As(err, &status) {
		return int(status)
	}
	if errors.Is(err, unix.EPIPE) {
		return exitSignal + int(unix.SIGPIPE)
	}
	if i, ok := context.Cause(ctx).(Interrupted); ok { //nolint:errorlint // the cause is ours
		// What was interrupted needs no words; what went wrong besides does.
		others := slices.DeleteFunc(flatten(err), func(err error) bool { return errors.Is(err, context.Canceled) })
		if len(others) > 0 {
			a.report(errors.Join(others...))
		}
		return i.ExitCode()
	}
	a.report(err)
	return exitCode(err)
}

func (a *app) execute(ctx context.Context, args []string) error {
	// A supervisor is long-lived and one a VM: it does without the memory that the rest takes.
	if len(args) > 0 && args[0] == supervise.Verb {
		c, err := supervise.Parse(args[1:])
		if err != nil {
			return &usageError{err: err}
		}
		return supervise.Run(ctx, c)
	}
	a.json = wantsJSON(args)
	root := a.root()
	root.SetArgs(args)
	return errors.Join(root.ExecuteContext(ctx), a.images.Close())
}

// app is one command line's run.
type app struct {
	Process
	global  globals
	json    bool // -o json
	copying human.Progress
	images  *images.Shell
	guest   *guest.Shell

	snapshots *snapshots.Shell
}

func (a *app) root() *cobra.Command {
	var version bool
	root := &cobra.Command{
		Use:   "smartvm",
		Short: "Run Firecracker microVMs",
		Long: "Run Firecracker microVMs: from a kernel and a few numbers, or a configuration\n" +
			"file, to a VM that leaves nothing behind when it ends.",
		Example: "  smartvm run -k vmlinux --drive rootfs.ext4,root -m 512M\n" +
			"  smartvm run -d --rm --name web -f vm.json\n" +
			"  smartvm logs -f web\n" +
			"  smartvm stop web",
		Args:                       cobra.ArbitraryArgs,
		SuggestionsMinimumDistance: 2,

		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case version:
				return (&versionCommand{app: a}).run(cmd, nil)
			case len(args) > 0:
				return unknownCommand(cmd, args[0])
			}
			return cmd.Help()
		},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.global.finish(cmd.Context(), a) },
	}
	root.Flags().BoolVar(&version, "version", false, "the same as smartvm version")
	root.SetIn(a.Stdin)
	root.SetOut(a.Stdout)
	root.SetErr(a.Stderr)
	root.SetHelpFunc(help.Show)
	root.SetUsageFunc(func(cmd *cobra.Command) error { help.Show(cmd, nil); return nil })
	root.SetFlagErrorFunc(flagError)
	a.global.flags(root)
	a.images, a.guest = a.imageShell(), a.guestShell()
	a.snapshots = a.snapshotShell()
	for _, command := range []func(*app) *cobra.Command{
		newRun, newCreate, newStart, newStop, newPause, newResume, newRemove, newPS, newInspect, newWait, newGC, newVersion,
	} {
		root.AddCommand(command(a))
	}
	root.AddCommand(slices.Concat(a.images.Commands(), (&disks.Shell{Shell: a.images}).Commands(),
		a.guest.Commands(), (&update.Shell{Shell: a.guest}).Commands(), a.snapshots.Commands())...)
	root.SetHelpCommand(newHelp())
	root.InitDefaultCompletionCmd()
	return root
}

// imageShell is what the commands about images need of this one.
func (a *app) imageShell() *images.Shell {
	return &images.Shell{
		Stdin: a.Stdin, Stdout: a.Stdout, Stderr: a.Stderr,
		JSON: func() bool {
			return a.json
		}, Terminal: func() bool { return terminal(a.Stderr) }, Screen: func() bool { return terminal(a.Stdout) },
		Status: a.status, Host: a.peek, Takes: takes, Registry: a.global.registry.Pull,
		Usage:     func(err error, hint string) error { return &usageError{err: err, hint: hint} },
		WriteJSON: func(v any) error { return writeJSON(a.Stdout, v) },
	}
}

// guestShell is the same for those about what goes on in a VM.
func (a *app) guestShell() *guest.Shell {
	return &guest.Shell{
		Stdin: a.Stdin, Stdout: a.Stdout, Stderr: a.Stderr, Kill: a.Kill, Resized: a.Resized, Term: os.Getenv("TERM"),
		LookupEnv: os.LookupEnv,
		JSON: func() bool {
			return a.json
		}, Terminal: func() bool {
			return terminal(a.Stdout)
		}, Status: a.status, Open: a.open, One: a.one, VMs: a.completeVMs, Takes: takes,
		Usage:     func(err error, hint string) error { return &usageError{err: err, hint: hint} },
		WriteJSON: func(v any) error { return writeJSON(a.Stdout, v) },
		Exit: func(code int) error {
			if code == 0 {
				return nil
			}
			return exitStatus(code)
		},
		Signal: func(ctx context.Context) syscall.Signal {
			i, _ := context.Cause(ctx).(Interrupted) //nolint:errorlint // the cause is ours
			return i.Signal
		},
	}
}

// snapshotShell is the same for those about snapshots.
func (a *app) snapshotShell() *snapshots.Shell {
	return &snapshots.Shell{
		Shell: a.guest, Host: a.peek, Self: a.global.self,
		Build: func(ctx context.Context, f *vmflags.Flags, args []string) (smartvm.Spec, error) {
			return a.build(ctx, f, args, new(images.PullPolicy("missing")))
		},
		Supervise: func(ctx context.Context, h *smartvm.Host, m *smartvm.Machine) error {
			return a.supervise(ctx, h, m, false)
		},
	}
}

// status shows on a terminal what takes longer than a second.
func (a *app) status(text func(elapsed time.Duration) string) (done func()) {
	if !terminal(a.Stderr) || a.json {
		return func() {}
	}
	return human.Status(a.Stderr, text)
}

// terminal says whether w is one that people look at.
func terminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
