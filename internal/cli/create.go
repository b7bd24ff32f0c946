package cli

import (
	"context"
	"encoding/json"
	"errors"
	"os"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cli/dryrun"
	"push.rocks/smartvm/internal/cli/images"
	"push.rocks/smartvm/internal/secret"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/vmflags"
)

type createCommand struct {
	*app
	vm     vmflags.Flags
	pull   images.PullPolicy
	dryRun bool
}

func newCreate(a *app) *cobra.Command {
	c := &createCommand{app: a}
	cmd := &cobra.Command{
		Use:   "create [flags] [IMAGE [COMMAND...]]",
		Short: "Create a VM without starting it",
		Long:  "Create a VM without starting it, and print its id. See smartvm run for IMAGE.",
		Example: "  smartvm create --name web debian:12\n" +
			"  smartvm create -f vm.json\n" +
			"  smartvm create --name db -k vmlinux --drive rootfs.ext4,root -c 2 -m 1G",
		Args: cobra.ArbitraryArgs,
		RunE: c.run,
	}
	cmd.Flags().SetInterspersed(false)
	c.vm.Add(cmd.Flags())
	c.pull.Flag(cmd)
	a.global.registry.Pull(cmd)
	cmd.Flags().BoolVar(&c.dryRun, "dry-run", false, "print what would be done, and do nothing")
	return cmd
}

func (c *createCommand) run(cmd *cobra.Command, args []string) error {
	ctx := cmd.Context()
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
	done := c.status(c.copying.Text)
	m, err := h.Create(ctx, vm)
	done()
	if err != nil {
		return err
	}
	return c.printID(m)
}

// build makes a VM's configuration. That it makes no sense is a usage error.
func (a *app) build(ctx context.Context, flags *vmflags.Flags, args []string,
	pull *images.PullPolicy,
) (smartvm.Spec, error) {
	flags.LookupEnv = os.LookupEnv
	vm, err := flags.Build(a.Stdin, args)
	errs := flatten(err)
	for i, err := range errs {
		if _, ok := err.(*smartvm.FieldError); !ok { //nolint:errorlint // wrapped, it would be another's
			errs[i] = &usageError{err: err}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return vm, err
	}
	// What makes no sense is said before anything is fetched.
	resolved := vm
	if err := errors.Join(vm.Validate(), errors.Join(share.Resolve(&resolved)...), secret.Check(vm)); err != nil {
		return vm, err
	}
	if err := a.images.EnsureFirecracker(ctx); err != nil || vm.Image == "" {
		return vm, err
	}
	return vm, a.images.Ensure(ctx, &vm, pull)
}

// plan shows what making and starting a VM would do.
func (a *app) plan(ctx context.Context, vm smartvm.Spec) error {
	h, err := a.peek()
	if err != nil {
		return err
	}
	defer h.Close()
	data, err := h.Plan(ctx, vm)
	if err != nil {
		return err
	}
	if a.json {
		return writeJSON(a.Stdout, json.RawMessage(data))
	}
	return dryrun.Print(a.Stdout, data)
}
