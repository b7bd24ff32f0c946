package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cli/keys"
	"push.rocks/smartvm/internal/hint"
)

// consoleBacklog is how many lines console begins with.
const consoleBacklog = 10

func (s *Shell) console() *cobra.Command {
	var interactive bool
	var detachKeys string
	cmd := &cobra.Command{
		Use:     "console [flags] VM",
		Aliases: []string{"attach"},
		Short:   "Watch a running VM's console, or type there",
		Long: fmt.Sprintf("Show the last %d lines of a running VM's console and what comes, until the VM\n"+
			"ends. Ctrl-C ends the watching, not the VM.\n\n"+
			"With -i, standard input is typed at the guest's serial port (ttyS0), where a\n"+
			"guest without agent may have a login. Of a terminal all keys are the guest's, also\n"+
			"Ctrl-C; Ctrl-P Ctrl-Q leaves. What others type at the same time is mixed in.", consoleBacklog),
		Example:           "  smartvm console web\n  smartvm console -i web\n  echo reboot | smartvm console -i web",
		Args:              s.Takes(1, 1, "one VM"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			quit, err := keys.Parse(detachKeys)
			if err != nil {
				return s.Usage(err, "")
			}
			return s.watch(cmd.Context(), args[0], interactive, quit)
		},
	}
	cmd.Flags().BoolVarP(&interactive, "interactive", "i", false, "pass standard input on")
	cmd.Flags().StringVar(&detachKeys, "detach-keys", keys.Default,
		"`keys` that leave the console, with -i and a terminal")
	return cmd
}

func (s *Shell) watch(ctx context.Context, ref string, interactive bool, quit []byte) error {
	h, m, err := s.One(ctx, ref)
	if err != nil {
		return err
	}
	defer h.Close()
	state, err := m.State(ctx)
	if err != nil {
		return err
	}
	if state != smartvm.Running && state != smartvm.Paused {
		return hint.Add(
			&smartvm.StateError{
				ID: m.ID(), Op: "watch console of", State: state,
				Want: []smartvm.State{smartvm.Running, smartvm.Paused},
			},
			"smartvm logs %s shows what it wrote", cmp.Or(m.Name(), m.ID()))
	}
	v := view{path: m.ConsoleLog(), lines: consoleBacklog, follow: true}
	if !interactive {
		return s.show(ctx, m, v)
	}
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	restore, err := s.typeAt(ctx, m, quit, leave)
	if err != nil {
		return err
	}
	err = s.show(ctx, m, v)
	restore()
	if errors.Is(err, keys.ErrDetach) {
		fmt.Fprintf(s.Stderr, "\r\nsmartvm: detached; VM %s goes on\n", m.ID())
		return nil
	}
	if err != nil && ctx.Err() != nil { // as nothing could be typed any more, or by a signal
		return context.Cause(ctx)
	}
	return err
}

// typeAt passes standard input on to a VM's console, and calls leave with the reason when that is
// over before the input's end. Restore makes a terminal what it was.
func (s *Shell) typeAt(
	ctx context.Context, m *smartvm.Machine, quit []byte, leave context.CancelCauseFunc,
) (restore func(), err error) {
	in, err := m.ConsoleInput(ctx)
	if err != nil {
		return nil, err
	}
	from, restore := s.Stdin, func() {}
	if s.typed() {
		if restore, err = s.makeRaw(); err != nil {
			return nil, errors.Join(err, in.Close())
		}
		if len(quit) > 0 {
			from = &keys.Reader{From: s.Stdin, Keys: quit, Detach: func() { leave(keys.ErrDetach) }}
		}
	}
	go func() {
		_, err := io.Copy(struct{ io.Writer }{in}, struct{ io.Reader }{from})
		// The VM's end ends the watching by itself.
		if err = errors.Join(err, in.Close()); err != nil && !errors.Is(err, smartvm.ErrState) {
			leave(fmt.Errorf("VM %s: %w", m.ID(), err))
		}
	}()
	return restore, nil
}
