// Package disks is the part of the command line that is about disks and named volumes.
package disks

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/cli/images"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/vmflags"
)

// Shell is the command line that the commands are part of.
type Shell struct{ *images.Shell }

// Commands are the groups.
func (s *Shell) Commands() []*cobra.Command { return []*cobra.Command{s.disk(), s.volume()} }

func (s *Shell) disk() *cobra.Command {
	return s.Group("disk", "Make and remove disks",
		"Make disks for --drive, and manage those that run --keep NAME has made.",
		s.createDisk(), s.cloneDisk(), s.resizeDisk(), s.trimDisks(), s.listDisks(), s.removeDisks())
}

func (s *Shell) createDisk() *cobra.Command {
	var size vmflags.Memory
	var kind string
	cmd := &cobra.Command{
		Use:     "create --size SIZE [flags] PATH",
		Short:   "Make an empty disk",
		Long:    "Make a sparse file with an empty file system in it. It needs mkfs.ext4 or mkfs.xfs.",
		Example: "  smartvm disk create --size 10G data.ext4",
		Args:    s.Takes(1, 1, "a path"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if size == 0 {
				return s.Usage(errors.New("--size is needed"), "")
			}
			if err := volume.Blank(cmd.Context(), args[0], kind, int64(size)<<20); err != nil {
				return s.Invalid(err)
			}
			return s.path(args[0])
		},
	}
	cmd.Flags().Var(&size, "size", "how large the guest sees it: `size` in MiB, or like 512M or 10G")
	cmd.Flags().StringVar(&kind, "type", "ext4", "file `system`: ext4 or xfs")
	return cmd
}

// path tells where a disk is.
func (s *Shell) path(path string) error {
	if s.JSON() {
		return s.WriteJSON(map[string]string{"path": path})
	}
	_, err := fmt.Fprintln(s.Stdout, path)
	return err
}

func (s *Shell) cloneDisk() *cobra.Command {
	return &cobra.Command{
		Use:   "clone SOURCE PATH",
		Short: "Copy a disk",
		Long: "Copy a disk that no VM writes: at once where the file system can share blocks\n" +
			"(XFS, btrfs), else without its holes. Of a VM that runs, make a snapshot.",
		Args: s.Takes(2, 2, "a source and a path"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.OnHost(func(h *smartvm.Host) error {
				done := s.Status(s.Transfer.Text)
				err := volume.Clone(cmd.Context(), args[0], args[1], volume.Options{
					InUse: unused(cmd.Context(), h), Progress: func(done, total int64) { s.Progress("copy", done, total) },
				})
				done()
				if err != nil {
					return s.Invalid(err)
				}
				return s.path(args[1])
			})
		},
	}
}

func (s *Shell) resizeDisk() *cobra.Command {
	return &cobra.Command{
		Use:     "resize PATH SIZE",
		Short:   "Change the size of a disk",
		Long:    "Change the size of a disk with an ext4 that no running VM has. It needs e2fsck\nand resize2fs, and refuses to make it smaller than what is in it.",
		Example: "  smartvm disk resize data.ext4 20G",
		Args:    s.Takes(2, 2, "a path and a size"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var size vmflags.Memory
			if err := size.Set(args[1]); err != nil {
				return s.Usage(fmt.Errorf("size %q: %w", args[1], err), "")
			}
			return s.OnHost(func(h *smartvm.Host) error {
				o := volume.Options{InUse: unread(cmd.Context(), h, false)}
				if err := volume.Resize(cmd.Context(), args[0], int64(size)<<20, o); err != nil {
					return s.Invalid(err)
				}
				return s.path(args[0])
			})
		},
	}
}

func (s *Shell) trimDisks() *cobra.Command {
	return s.trim("PATH...", "a path", func(_ *smartvm.Host, path string) (string, error) { return path, nil })
}

// trim is the command that makes holes in disks, which find finds.
func (s *Shell) trim(args, want string, find func(h *smartvm.Host, arg string) (string, error)) *cobra.Command {
	return &cobra.Command{
		Use:   "trim " + args,
		Short: "Give the host back what is free in disks",
		Long: "Make holes of what is free in disks with an ext4 that no running VM has: what\n" +
			"guests have deleted comes back to the host. It needs e2fsck. With Firecracker\n" +
			"1.17 and later it comes back while the guest runs.\n\n" +
			"The fields of -o json: path, freed (bytes).",
		Args: s.Takes(1, -1, want),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.OnHost(func(h *smartvm.Host) error {
				o := volume.Options{InUse: unread(cmd.Context(), h, false)}
				return s.Each(cmd.Context(), args, func(ctx context.Context, arg string) (any, error) {
					path, err := find(h, arg)
					if err != nil {
						return nil, s.Invalid(err)
					}
					freed, err := volume.Trim(ctx, path, o)
					return map[string]any{"path": path, "freed": freed}, s.Invalid(err)
				})
			})
		},
	}
}

func (s *Shell) listDisks() *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the disks that have names",
		Long:    "List the disks that run --keep NAME has made.\n\nThe fields of -o json: name, path, size, used (bytes).",
		Args:    s.Takes(0, 0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			return s.OnHost(func(h *smartvm.Host) error {
				volumes, err := h.Volumes()
				if err != nil {
					return err
				}
				all, err := volumes.List()
				if err != nil {
					return err
				}
				if s.JSON() {
					return s.WriteJSON(append([]volume.Disk{}, all...))
				}
				var rows []string
				for _, d := range all {
					rows = append(rows, fmt.Sprintf("%s\t%s\t%s", d.Name, human.Size(d.Size), human.Size(d.Used)))
				}
				return s.Table("NAME\tSIZE\tUSED", rows)
			})
		},
	}
}

func (s *Shell) removeDisks() *cobra.Command {
	return s.remove("disks that have names", "--keep NAME", func(all *volume.Store) *volume.Store { return all })
}

// remove is the command that removes what run made with a flag.
func (s *Shell) remove(what, flag string, of func(*volume.Store) *volume.Store) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm [-f] NAME...",
		Short: "Remove " + what,
		Long: "Remove " + what + ", which run " + flag +
			" has made, with all that is on\nthem. What a VM has is not removed.",
		Args: s.Takes(1, -1, "a name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.OnHost(func(h *smartvm.Host) error {
				volumes, err := h.Volumes()
				if err != nil {
					return err
				}
				o := volume.Options{InUse: unread(cmd.Context(), h, !force)}
				return s.Each(cmd.Context(), args, func(_ context.Context, name string) (any, error) {
					return map[string]string{"name": name}, s.Invalid(of(volumes).Remove(name, o))
				})
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "also those of stopped VMs, which cannot start without them")
	return cmd
}
