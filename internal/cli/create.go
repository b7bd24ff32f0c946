package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/vmflags"
)

type createCommand struct {
	*app
	vm     vmflags.Flags
	dryRun bool
}

func newCreate(a *app) *cobra.Command {
	c := &createCommand{app: a}
	cmd := &cobra.Command{
		Use:   "create [flags]",
		Short: "Create a VM without starting it",
		Long:  "Create a VM without starting it, and print its id.",
		Example: "  smartvm create -f vm.json\n" +
			"  smartvm create --name db -k vmlinux --drive rootfs.ext4,root -c 2 -m 1G",
		Args: takes(0, 0, "flags only"),
		RunE: c.run,
	}
	c.vm.Add(cmd.Flags())
	cmd.Flags().BoolVar(&c.dryRun, "dry-run", false, "print what would be done, and do nothing")
	return cmd
}

func (c *createCommand) run(cmd *cobra.Command, _ []string) error {
	ctx := cmd.Context()
	vm, err := c.build(&c.vm)
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
func (a *app) build(flags *vmflags.Flags) (smartvm.Spec, error) {
	vm, err := flags.Build(a.Stdin)
	errs := flatten(err)
	for i, err := range errs {
		if _, ok := err.(*smartvm.FieldError); !ok { //nolint:errorlint // wrapped, it would be another's
			errs[i] = &usageError{err: err}
		}
	}
	return vm, errors.Join(errs...)
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
	type step struct {
		Kind   string          `json:"kind"`
		Effect json.RawMessage `json:"effect"`
	}
	var plan struct {
		Create, Run []step
		Argv        []string
		Calls       []struct {
			Path string          `json:"path"`
			Body json.RawMessage `json:"body"`
		}
	}
	if err := json.Unmarshal(data, &plan); err != nil {
		return fmt.Errorf("read plan: %w", err)
	}
	for _, part := range []struct {
		title string
		steps []step
	}{{"To create it, until it is removed:", plan.Create}, {"To start it, until it has stopped:", plan.Run}} {
		fmt.Fprintln(a.Stdout, part.title)
		for _, s := range part.steps {
			fmt.Fprintf(a.Stdout, "  %-8s %s\n", s.Kind, members(s.Effect))
		}
	}
	fmt.Fprintf(a.Stdout, "The VMM's command line:\n  %s\nWhat it is told:\n", strings.Join(plan.Argv, " "))
	for _, c := range plan.Calls {
		fmt.Fprintf(a.Stdout, "  %-18s %s\n", c.Path, members(c.Body))
	}
	return nil
}

// members shows an object's members in their order, one level deep.
func members(object json.RawMessage) string {
	var parts []string
	dec := json.NewDecoder(bytes.NewReader(object))
	_, _ = dec.Token()
	for dec.More() {
		key, err := dec.Token()
		var value json.RawMessage
		if err != nil || dec.Decode(&value) != nil {
			return string(object)
		}
		parts = append(parts, fmt.Sprintf("%s=%s", key, bytes.Trim(value, `"`)))
	}
	return strings.Join(parts, " ")
}
