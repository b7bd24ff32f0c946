package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/supervise"
)

// atOnce is how many VMs one command works on at a time.
const atOnce = 8

// each finds the VMs that refs name and does something to all of them, some at a time. It prints
// the references of those with which it went well, or with -o json what do returned, and returns
// what went wrong with the others.
func (a *app) each(ctx context.Context, refs []string, what string,
	do func(context.Context, *smartvm.Host, *smartvm.Machine) (any, error),
) error {
	h, err := a.open(ctx)
	if err != nil {
		return err
	}
	defer h.Close()
	done := a.status(human.Doing(what))
	results, errs := make([]any, len(refs)), make([]error, len(refs))
	slots := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i, ref := range refs {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			m, err := h.Machine(ctx, ref)
			if err == nil {
				a.global.log.Debug(what, "vm", m.ID())
				results[i], err = do(ctx, h, m)
			}
			errs[i] = err
		})
	}
	wg.Wait()
	done()
	good := []any{}
	for i, ref := range refs {
		if errs[i] != nil {
			continue
		}
		good = append(good, results[i])
		if !a.json {
			fmt.Fprintln(a.Stdout, ref)
		}
	}
	if a.json {
		errs = append(errs, writeJSON(a.Stdout, good))
	}
	return errors.Join(errs...)
}

// supervise gives m a process of its own, which starts it, or supervises it when it runs.
func (a *app) supervise(ctx context.Context, h *smartvm.Host, m *smartvm.Machine, adopt bool) error {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	c := supervise.Config{
		RuntimeDir: h.RuntimeDir(), DataDir: h.DataDir(), Firewall: a.global.firewall,
		ID: m.ID(), Adopt: adopt, Verbose: a.global.verbose, Warnings: a.Stderr,
	}
	// Read here: where the environment is whose variables an env file may name.
	if c.Secrets, err = m.Secrets(); err != nil && !adopt {
		return err
	}
	return c.Spawn(ctx, program)
}

// one finds the VM of a command that is about one.
func (a *app) one(ctx context.Context, ref string) (*smartvm.Host, *smartvm.Machine, error) {
	h, err := a.open(ctx)
	if err != nil {
		return nil, nil, err
	}
	m, err := h.Machine(ctx, ref)
	if err != nil {
		return nil, nil, errors.Join(err, h.Close())
	}
	return h, m, nil
}

// completeVMs offers the VMs there are: ids, and names where they have one. It finds none where
// anything is wrong.
func (a *app) completeVMs(most int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if most >= 0 && len(args) >= most || a.global.finish(cmd.Context(), a) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		h, err := a.peek()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer h.Close()
		all, _ := h.Machines(cmd.Context())
		var found []cobra.Completion
		for _, m := range all {
			found = append(found, cobra.CompletionWithDesc(m.ID(), m.Name()))
			if m.Name() != "" {
				found = append(found, cobra.CompletionWithDesc(m.Name(), m.ID()))
			}
		}
		return found, cobra.ShellCompDirectiveNoFileComp
	}
}
