// Package guest has the commands about what goes on in a VM.
package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cli/keys"
	"push.rocks/smartvm/internal/secret"
)

// Shell is what the commands need of the command line around them.
type Shell struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Term           string // the kind of the terminal
	JSON           func() bool
	Terminal       func() bool                 // standard output is one
	LookupEnv      func(string) (string, bool) // in this process's environment
	Kill           <-chan struct{}             // closed when the end is wanted at once
	Resized        <-chan struct{}             // the terminal has another size
	// Status shows what is going on, until done.
	Status func(text func(time.Duration) string) (done func())
	// Open opens the host, after what died has been cleared away. The caller closes it.
	Open func(ctx context.Context) (*smartvm.Host, error)
	// One does that, and finds a VM.
	One func(ctx context.Context, ref string) (*smartvm.Host, *smartvm.Machine, error)
	// VMs completes the names of VMs.
	VMs func(most int) cobra.CompletionFunc
	// Usage makes the error of a command line that makes no sense.
	Usage func(err error, hint string) error
	// Takes checks the number of arguments.
	Takes func(least, most int, what string) cobra.PositionalArgs
	// WriteJSON writes a document to Stdout.
	WriteJSON func(v any) error
	// Exit makes the process's exit code.
	Exit func(code int) error
	// Signal is the one that has ended ctx, 0 for none.
	Signal func(ctx context.Context) syscall.Signal
}

// Commands are those of this package.
func (s *Shell) Commands() []*cobra.Command {
	return []*cobra.Command{
		s.exec(), s.shell(), s.copy(), s.commit(), s.stats(), s.top(), s.forward(), s.port(), s.logs(),
		s.console(), s.events(), s.agent(),
	}
}

// each does something to VMs, all at once, and returns what went wrong.
func (s *Shell) each(ctx context.Context, refs []string, do func(i int, m *smartvm.Machine) error) error {
	h, err := s.Open(ctx)
	if err != nil {
		return err
	}
	errs := make([]error, len(refs))
	var all sync.WaitGroup
	for i, ref := range refs {
		all.Go(func() {
			m, err := h.Machine(ctx, ref)
			if err == nil {
				err = do(i, m)
			}
			errs[i] = err
		})
	}
	all.Wait()
	return errors.Join(append(errs, h.Close())...)
}

// Streams says how a command in a guest is connected.
type Streams struct {
	Interactive, TTY bool
	keys             string // that detach, where there is a terminal
	Left             func() // called when the command was left to itself; may be nil
}

// Flags adds -i and -t.
func (o *Streams) Flags(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&o.Interactive, "interactive", "i", false, "pass standard input on")
	cmd.Flags().BoolVarP(&o.TTY, "tty", "t", false, "give the command a terminal")
}

// detachFlag adds --detach-keys.
func (o *Streams) detachFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.keys, "detach-keys", keys.Default, "`keys` that leave the command to itself, with -it")
}

// Connect returns a command with this process's streams, and a context for its run: the first
// signal is passed on to the command, the next one ends it. The caller calls done.
func (s *Shell) Connect(ctx context.Context, o Streams) (_ context.Context, cmd smartvm.Cmd, done func(), err error) {
	cmd = smartvm.Cmd{Stdout: s.Stdout, Stderr: s.Stderr, TTY: o.TTY, Term: s.Term}
	if o.Interactive {
		cmd.Stdin = s.Stdin
	}
	if quit, err := keys.Parse(o.keys); err != nil {
		return nil, cmd, nil, s.Usage(err, "")
	} else if o.Interactive && o.TTY && len(quit) > 0 {
		detach := make(chan struct{})
		cmd.Stdin, cmd.Detach = &keys.Reader{From: s.Stdin, Keys: quit, Detach: func() { close(detach) }}, detach
	}
	restore := func() {}
	if o.TTY {
		if restore, err = s.raw(o, &cmd); err != nil {
			return nil, cmd, nil, err
		}
	}
	signals, sizes := make(chan syscall.Signal, 1), make(chan smartvm.TermSize, 1)
	cmd.Signals, cmd.Resize = signals, sizes
	running, end := context.WithCancelCause(context.WithoutCancel(ctx))
	go func() {
		interrupted := ctx.Done()
		for {
			select {
			case <-running.Done():
				return
			case <-interrupted:
				if signal := s.Signal(ctx); signal != 0 {
					signals <- signal
				} else {
					end(context.Cause(ctx))
				}
				interrupted = nil
			case <-s.Kill:
				end(context.Cause(ctx))
				return
			case <-s.Resized:
				select {
				case <-sizes: // the last one counts
				default:
				}
				sizes <- s.size()
			}
		}
	}()
	return running, cmd, func() { end(nil); restore() }, nil
}

// raw gives the guest what is typed as it is.
func (s *Shell) raw(o Streams, cmd *smartvm.Cmd) (restore func(), err error) {
	cmd.Size = s.size()
	if !o.Interactive {
		return func() {}, nil
	}
	if !s.typed() {
		return nil, s.Usage(errors.New("standard input is no terminal"), "leave -t out")
	}
	return s.makeRaw()
}

// typed says whether standard input is a terminal.
func (s *Shell) typed() bool {
	f, ok := s.Stdin.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// makeRaw has the terminal pass on what is typed as it is, until restore.
func (s *Shell) makeRaw() (restore func(), err error) {
	f := s.Stdin.(*os.File)
	before, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("set terminal: %w", err)
	}
	return func() { _ = term.Restore(int(f.Fd()), before) }, nil
}

// size is that of the terminal, as far as there is one.
func (s *Shell) size() smartvm.TermSize {
	for _, w := range []any{s.Stdout, s.Stdin} {
		if f, ok := w.(*os.File); ok {
			if cols, rows, err := term.GetSize(int(f.Fd())); err == nil {
				return smartvm.TermSize{Rows: uint16(rows), Cols: uint16(cols)} //nolint:gosec // the kernel has 16 bits
			}
		}
	}
	return smartvm.TermSize{}
}

// Run runs a command in a VM and exits as that does.
func (s *Shell) Run(ctx context.Context, ref string, o Streams, set func(*smartvm.Cmd)) error {
	h, m, err := s.One(ctx, ref)
	if err != nil {
		return err
	}
	defer h.Close()
	running, cmd, done, err := s.Connect(ctx, o)
	if err != nil {
		return err
	}
	set(&cmd)
	told := s.tellPauses(ctx, m, o)
	exit, err := m.Exec(running, cmd)
	told()
	done()
	if errors.Is(err, smartvm.ErrDetached) {
		fmt.Fprintf(s.Stderr, "\r\nsmartvm: detached; the command goes on in VM %s\n", m.ID())
		if o.Left != nil {
			o.Left()
		}
		return nil
	}
	if err != nil {
		return err
	}
	if exit.Reason != "" {
		fmt.Fprintf(s.Stderr, "smartvm: in VM %s: %s\n", m.ID(), exit.Reason)
	}
	return s.Exit(exit.Code)
}

func (s *Shell) exec() *cobra.Command {
	var o Streams
	var user, dir string
	var env, envFiles []string
	cmd := &cobra.Command{
		Use:   "exec [flags] VM COMMAND...",
		Short: "Run a command in a VM",
		Long: "Run a command in a running VM. Its output and exit code are this command's; the\n" +
			"first Ctrl-C is its, another one ends it. The code is 127 when there is no such\n" +
			"program, 126 when it cannot be run, and 125 when smartvm failed.\n\n" +
			"With -it, Ctrl-P Ctrl-Q leaves it to itself: it goes on in the VM, and nobody\n" +
			"sees what it puts out. When this command is killed, that in the VM gets SIGHUP.",
		Example: "  smartvm exec web uname -a\n" +
			"  smartvm exec -it web sh\n" +
			"  tar c . | smartvm exec -i web tar x -C /srv",
		Args:              s.Takes(2, -1, "a VM and a command"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args = append(args[:1:1], afterDashes(args[1:])...); len(args) < 2 {
				return s.Usage(errors.New("no command to run"), "smartvm exec VM COMMAND...")
			}
			fromFiles, err := secret.ReadEnv(envFiles, secret.Options{LookupEnv: s.LookupEnv})
			if err != nil {
				return s.Usage(err, "")
			}
			own, err := secret.Variables(env, s.LookupEnv)
			if err != nil {
				return s.Usage(err, "")
			}
			env = append(fromFiles, own...)
			return s.Run(cmd.Context(), args[0], o, func(c *smartvm.Cmd) {
				c.Args, c.User, c.Dir, c.Env = args[1:], user, dir, env
			})
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the VM is the command's
	f.SortFlags = false
	o.Flags(cmd)
	o.detachFlag(cmd)
	f.StringVarP(&user, "user", "u", "", "`user` of the guest that runs it, NAME or UID, and optionally :GROUP")
	f.StringVarP(&dir, "workdir", "w", "", "`dir` to run it in")
	f.StringArrayVarP(&env, "env", "e", nil,
		"`NAME=VALUE` for it, or NAME for the value that it has here; may be repeated")
	f.StringArrayVar(&envFiles, "env-file", nil, "`file` with NAME=VALUE lines; may be repeated, -e counts before it")
	return cmd
}

// afterDashes takes away "--" before a command.
func afterDashes(args []string) []string {
	if len(args) > 0 && args[0] == "--" {
		return args[1:]
	}
	return args
}

// loginShell is bash where there is one.
const loginShell = "if [ -x /bin/bash ]; then exec /bin/bash -l; fi; exec /bin/sh -l"

func (s *Shell) shell() *cobra.Command {
	var user string
	var o Streams
	cmd := &cobra.Command{
		Use:               "shell [flags] VM",
		Short:             "Open a shell in a VM",
		Args:              s.Takes(1, 1, "one VM"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Interactive, o.TTY = true, s.typed()
			return s.Run(cmd.Context(), args[0], o, func(c *smartvm.Cmd) {
				c.Args, c.User = []string{"/bin/sh", "-c", loginShell}, user
			})
		},
	}
	o.detachFlag(cmd)
	cmd.Flags().StringVarP(&user, "user", "u", "", "`user` of the guest, NAME or UID, and optionally :GROUP")
	return cmd
}
