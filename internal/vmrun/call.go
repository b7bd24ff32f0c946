package vmrun

import (
	"context"
	"errors"
	"time"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/control"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/status"
)

// Call talks to the VMM of a started VM, if op, one of Operations, is allowed. Name is what the
// caller called.
func (v *VM) Call(ctx context.Context, op, name string, f func(*firecracker.Client) error) error {
	if err := v.Allowed(ctx, op, name); err != nil {
		return err
	}
	proc, c := v.Process(), (*firecracker.Client)(nil)
	if r := v.current(); r != nil {
		proc, c = r.proc, r.client
	} else {
		c = v.Dial()
		defer c.Close()
	}
	defer proc.EndIfHung(ctx)()
	if err := f(c); err != nil {
		return &status.MachineError{ID: v.Record().ID, Stage: name, Err: err}
	}
	return nil
}

// listenTime is how long a process that has just begun to supervise a VM may take until it can be
// asked.
const listenTime = 5 * time.Second

// NotifySupervisor has the process that supervises the VM, if one does, look at its record, and
// returns what came of it.
func (v *VM) NotifySupervisor(ctx context.Context) error {
	for begun := time.Now(); ; {
		err := control.Ask(ctx, v.Dir(), store.ControlSocket)
		if !errors.Is(err, control.ErrNobody) {
			return err
		}
		if supervised, err := v.Supervised(); !supervised || time.Since(begun) > listenTime {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(poll):
		}
	}
}
