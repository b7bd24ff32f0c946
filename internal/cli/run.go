package cli

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cli/guest"
	"push.rocks/smartvm/internal/cli/images"
	"push.rocks/smartvm/internal/cli/snapshots"
	"push.rocks/smartvm/internal/supervise"
	"push.rocks/smartvm/internal/vmflags"
)

type runCommand struct {
	*app
	vm             vmflags.Flags
	pull           images.PullPolicy
	streams        guest.Streams
	detach, remove bool
	wait           guest.Wait
	dryRun         bool
	pool           string
	stopTimeout    vmflags.Seconds
}

func newRun(a *app) *cobra.Command {
	c := &runCommand{app: a}
	cmd := &cobra.Command{
		Use:   "run [flags] [IMAGE [COMMAND...]]",
		Short: "Create and start a VM, and remove it when it ends",
		Long: "Create and start a VM, and remove it when it ends.\n\n" +
			"IMAGE is what smartvm image pull or import takes or has made; it is pulled if it\n" +
			"is not here. COMMAND runs in it in place of its own; its output and exit code are\n" +
			"those of this command. The first Ctrl-C is the command's, a second one kills the\n" +
			"VM. What the guest writes goes away with the VM, unless --keep is given.\n\n" +
			"Of an image with an init of its own, and without an image, the console is shown.\n" +
			"Ctrl-C asks the guest to shut down then, a second one kills it.\n\n" +
			"With -d the VM runs on by itself and its id is printed. It is kept when it ends,\n" +
			"unless --rm is given.\n\n" +
			"The exit code is 0 when the guest shut down or rebooted, 137 when it was killed,\n" +
			"2 when something is wrong with what was asked for, 130 after Ctrl-C, and 125\n" +
			"when smartvm or the VMM failed.",
		Example: "  smartvm run debian:12 -- uname -a\n" +
			"  smartvm run -k vmlinux --initrd initramfs.cpio -m 256M\n" +
			"  smartvm run -k vmlinux --drive rootfs.ext4,root --drive data.img:ro\n" +
			"  smartvm run -d --rm --name web -f vm.json",
		Args: cobra.ArbitraryArgs,
		RunE: c.run,
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the image is the command's
	c.vm.Add(cmd.Flags())
	c.pull.Flag(cmd)
	a.global.registry.Pull(cmd)
	c.streams.Flags(cmd)
	f.BoolVarP(&c.detach, "detach", "d", false, "let the VM run by itself and print its id")
	c.wait.Flag(cmd, "with -d, ")
	f.BoolVar(&c.remove, "rm", false, "with -d, remove the VM when it ends")
	c.stopTimeout = vmflags.Seconds(smartvm.DefaultStopTimeout)
	f.Var(&c.stopTimeout, "stop-timeout", "`seconds` for the guest to shut down on Ctrl-C")
	f.StringVar(&c.pool, "pool", "", "take a VM of this `pool` and run COMMAND in it; see smartvm pool")
	f.BoolVar(&c.dryRun, "dry-run", false, "print what would be done, and do nothing")
	return cmd
}

func (c *runCommand) run(cmd *cobra.Command, args []string) error {
	ctx := cmd.Context()
	if c.pool != "" {
		if err := c.pooled(cmd, args); err != nil {
			return err
		}
		return c.snapshots.RunPooled(ctx, snapshots.Pooled{Pool: c.pool, Command: args, Detach: c.detach, Streams: c.streams})
	}
	vm, err := c.build(ctx, &c.vm, args, &c.pull)
	if err != nil {
		return err
	}
	if c.dryRun {
		return c.plan(ctx, vm)
	}
	h, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer h.Close()
	if c.detach {
		return c.detached(ctx, h, vm)
	}
	return c.attached(ctx, h, vm)
}

// pooled refuses what cannot be had of a VM that is there already.
func (c *runCommand) pooled(cmd *cobra.Command, args []string) error {
	var refused []string
	cmd.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
		if f.Changed && !slices.Contains([]string{"pool", "detach", "interactive", "tty"}, f.Name) {
			refused = append(refused, "--"+f.Name)
		}
	})
	switch {
	case len(refused) > 0:
		return usage("--pool %s: its VMs are made already, so %s has no effect: give it to pool create, or to exec", c.pool,
			strings.Join(refused, ", "))
	case c.detach && len(args) > 0:
		return usage("-d --pool %s takes no COMMAND: exec runs one in the VM", c.pool)
	}
	return nil
}

// attached runs a VM whose life is this command's.
func (c *runCommand) attached(ctx context.Context, h *smartvm.Host, vm smartvm.Spec) error {
	if vm.ID == "" { // known before, so that the VM can be killed at any time
		vm.ID = drawID()
	}
	ended := make(chan struct{})
	defer close(ended)
	go c.killed(ctx, h, vm.ID, ended)
	ctx, broken := context.WithCancelCause(ctx)
	defer broken(nil)
	console := &guest.Output{To: c.Stdout, Broken: broken, First: c.status(c.copying.Text)}
	o := smartvm.RunOptions{Console: console, Stop: smartvm.StopOptions{Timeout: time.Duration(c.stopTimeout)}}
	begun := time.Now()
	if vm.Image != "" {
		return c.streamed(ctx, h, vm, o)
	}
	defer context.AfterFunc(ctx, func() { c.stopping(vm.ID) })()
	exit, err := h.Run(ctx, vm, o)
	console.First()
	if !console.LineEnded && terminal(c.Stdout) {
		fmt.Fprintln(c.Stdout)
	}
	if e, ok := errors.AsType[*smartvm.MachineError](err); ok {
		e.Console = "" // it was shown
	}
	switch {
	case err != nil && ctx.Err() == nil:
		return err
	case ctx.Err() != nil:
		return errors.Join(context.Cause(ctx), err)
	}
	if terminal(c.Stderr) && !c.json {
		fmt.Fprintf(c.Stderr, "smartvm: %s ended after %.1f s: %s\n", vm.ID, time.Since(begun).Seconds(), exit)
	}
	return statusOf(exit)
}

// streamed runs a VM whose command has this command's streams, if its image has one.
func (c *runCommand) streamed(ctx context.Context, h *smartvm.Host, vm smartvm.Spec, o smartvm.RunOptions) error {
	shown := o.Console.(*guest.Output) //nolint:errorlint,forcetypeassert // it is ours
	running, cmd, done, err := c.guest.Connect(ctx, c.streams)
	if err != nil {
		shown.First()
		return err
	}
	defer context.AfterFunc(ctx, func() { // an init of the image's own takes no signals
		if shown.Used() {
			c.stopping(vm.ID)
			done()
		}
	})()
	cmd.Stdout, cmd.Stderr = shown.Also(c.Stdout), shown.Also(c.Stderr)
	o.Command = &cmd
	exit, err := h.Run(running, vm, o)
	stopped := running.Err() != nil
	done()
	shown.First()
	if e, ok := errors.AsType[*smartvm.MachineError](err); ok && shown.Used() {
		e.Console = ""
	}
	switch {
	case stopped:
		return context.Cause(ctx)
	case err != nil:
		return err
	case exit != nil && exit.Command != nil && exit.Command.Reason != "":
		fmt.Fprintf(c.Stderr, "smartvm: in VM %s: %s\n", vm.ID, exit.Command.Reason)
	}
	return statusOf(exit)
}

func (c *runCommand) stopping(id string) {
	c.global.log.Debug("stopping", "vm", id)
	if terminal(c.Stderr) && !c.json {
		fmt.Fprintln(c.Stderr, "\r\nsmartvm: asking the guest to shut down; Ctrl-C again kills it")
	}
}

// killed kills the VM when a second signal comes.
func (c *runCommand) killed(ctx context.Context, h *smartvm.Host, id string, ended <-chan struct{}) {
	select {
	case <-ctx.Done():
	case <-ended:
		return
	}
	select {
	case <-c.Kill:
		down := context.WithoutCancel(ctx)
		if m, err := h.Machine(down, id); err == nil {
			_, _ = m.Stop(down, smartvm.StopOptions{}) // Run tells what went wrong
		}
	case <-ended:
	}
}

// detached starts a VM that lives on.
func (c *runCommand) detached(ctx context.Context, h *smartvm.Host, vm smartvm.Spec) error {
	done := c.status(c.copying.Text)
	m, err := h.Create(ctx, vm)
	done()
	if err != nil {
		return err
	}
	if c.remove {
		err = supervise.RemoveAtEnd(m)
	}
	if err == nil {
		err = c.supervise(ctx, h, m, false)
	}
	if err != nil {
		return errors.Join(err, supervise.Remove(context.WithoutCancel(ctx), m))
	}
	err = c.printID(m)
	_, notReady := c.guest.Ready(ctx, m, c.wait)
	return errors.Join(err, notReady)
}

func drawID() string {
	b := make([]byte, 6)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// statusOf is the exit code that a VM's end gives.
func statusOf(exit *smartvm.Exit) error {
	switch {
	case exit == nil, exit.Outcome == smartvm.OutcomeLost, exit.Outcome == smartvm.OutcomeFailed,
		exit.Outcome == smartvm.OutcomeCrashed:
		return exitStatus(exitFailed)
	case exit.Outcome == smartvm.OutcomeKilled:
		return exitStatus(exitSignal + int(unix.SignalNum(exit.Signal)))
	case exit.Command != nil && exit.Command.Code != 0:
		return exitStatus(exit.Command.Code)
	case exit.Code != 0:
		return exitStatus(exit.Code)
	}
	return nil
}
