package smartvm

import (
	"context"
	"errors"
	"io"
	"sync"

	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/store"
)

// RunOptions are what Run needs besides a Spec.
type RunOptions struct {
	Console io.Writer // receives what the guest writes, as it comes; may be nil
	// Command, if not nil, has the streams of the image's command, and its terminal and signals; the
	// command waits until the guest is ready for that. Otherwise the command's streams are the
	// console. Of an image with an init of its own it is ignored.
	Command *Cmd
	Stop    StopOptions // how to end the VM when the context ends
}

// Run makes and starts a VM, waits for its end and removes it. The call is the VM's life: when ctx
// ends, so does the VM, and if this process dies, the next Recover ends it. An error of the context
// is not returned once the VM has run. A VMM that gives up is a *MachineError, and the Exit comes
// with it.
func (h *Host) Run(ctx context.Context, spec Spec, opts RunOptions) (*Exit, error) {
	m, lock, err := h.create(ctx, spec, &opts)
	if err != nil {
		return nil, err
	}
	down := context.WithoutCancel(ctx)
	hasCommand := m.rec().HasAgent() && m.rec().Boot.Guest.Attach
	if hasCommand {
		opts.Console = nil // the command's streams are what counts
	}
	r, err := m.vm.Start(ctx, lock, opts.Console)
	if err != nil {
		return nil, errors.Join(err, m.vm.RemoveIfThere(down))
	}
	var commandErr error
	if hasCommand {
		if _, commandErr = r.Command(ctx, *opts.Command); commandErr != nil && ctx.Err() == nil {
			// Its output is not read any more: it is not to go on.
			_, err := m.Stop(down, opts.Stop)
			commandErr = errors.Join(commandErr, err)
		}
	}
	select {
	case <-r.Done():
	case <-ctx.Done():
		if _, err := m.Stop(down, opts.Stop); err != nil {
			return nil, errors.Join(err, m.vm.RemoveIfThere(down))
		}
		<-r.Done()
	}
	exit, err := r.Result()
	if commandErr != nil && ctx.Err() == nil {
		err = errors.Join(err, m.vm.Fail("run", commandErr, nil))
	}
	if exit != nil && exit.Outcome == OutcomeCrashed { // its log goes with the VM
		err = errors.Join(err, m.vm.Fail("run", errors.New("the VMM gave up"), exit))
	}
	if failed, _ := share.PutOff(m.vm.Path(store.PendingFile), h.env.Log.With("vm", m.ID())); failed {
		return exit, err // it cannot be removed, and another try would end alike
	}
	return exit, errors.Join(err, m.vm.RemoveIfThere(down))
}

// StopAll stops every VM of the runtime directory at once, in whichever process, and returns all
// that went wrong.
func (h *Host) StopAll(ctx context.Context, opts StopOptions) error {
	all, err := h.Machines(ctx)
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, m := range all {
		wg.Go(func() { _, errs[i] = m.Stop(ctx, opts) })
	}
	wg.Wait()
	return errors.Join(append(errs, err)...)
}
