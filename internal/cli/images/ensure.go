package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
)

// PullPolicy says when an image is fetched.
type PullPolicy string

var pullPolicies = []string{"missing", "always", "never"}

// Flag adds the flag that sets it.
func (p *PullPolicy) Flag(cmd *cobra.Command) {
	cmd.Flags().StringVar((*string)(p), "pull", "missing", "`when` to fetch the image: missing, always or never")
	_ = cmd.RegisterFlagCompletionFunc("pull", cobra.FixedCompletions(pullPolicies, cobra.ShellCompDirectiveNoFileComp))
}

// EnsureFirecracker fetches Firecracker where there is none.
func (s *Shell) EnsureFirecracker(ctx context.Context) error {
	h, err := s.Host()
	if err != nil {
		return err
	}
	done := s.Status(s.Transfer.Text)
	err = h.EnsureFirecracker(ctx)
	done()
	return errors.Join(err, h.Close())
}

// Ensure fetches the image that vm names, if it is not here, and has vm name what it is called
// here.
func (s *Shell) Ensure(ctx context.Context, vm *smartvm.Spec, pull *PullPolicy) error {
	if !slices.Contains(pullPolicies, string(*pull)) {
		return s.Usage(fmt.Errorf("--pull %q: want missing, always or never", *pull), "")
	}
	images, err := s.store()
	if err != nil {
		return err
	}
	if *pull != "always" {
		i, err := images.Find(vm.Image)
		if err == nil && *pull == "missing" {
			done := s.Status(s.Transfer.Text)
			i, err = images.Restore(ctx, i)
			done()
		}
		if err == nil {
			vm.Image = i.Name
			return nil
		}
		if !errors.Is(err, image.ErrNotFound) || *pull == "never" {
			return nil // Create says it
		}
	}
	i, err := s.Pull(ctx, images, vm.Image, "")
	if err != nil {
		if *pull == "missing" && !errors.Is(err, fs.ErrInvalid) {
			err = fmt.Errorf("image %s is not here: %w", vm.Image, err)
		}
		return err
	}
	vm.Image = i.Name
	return nil
}
