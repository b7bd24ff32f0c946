package cli

import (
	"errors"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
)

// inspected is what inspect says of a VM.
type inspected struct {
	*smartvm.Inspection
	Supervised bool `json:"supervised"` // a process supervises it
}

func newInspect(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "inspect VM...",
		Short:             "Tell all about VMs, as JSON",
		Args:              takes(1, -1, "the VMs to inspect"),
		ValidArgsFunction: a.completeVMs(-1),
		RunE:              a.inspect,
	}
}

func (a *app) inspect(cmd *cobra.Command, refs []string) error {
	h, err := a.open(cmd.Context())
	if err != nil {
		return err
	}
	defer h.Close()
	all := []inspected{}
	var errs []error
	for _, ref := range refs {
		m, err := h.Machine(cmd.Context(), ref)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		in, err := m.Inspect(cmd.Context())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		supervised, err := m.Supervised()
		errs = append(errs, err)
		all = append(all, inspected{in, supervised})
	}
	return errors.Join(append(errs, writeJSON(a.Stdout, all))...)
}
