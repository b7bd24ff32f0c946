package disks

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/vmflags"
	"push.rocks/smartvm/spec"
)

func (s *Shell) volume() *cobra.Command {
	return s.Group("volume", "Make and remove named volumes",
		"Manage the volumes that run -v NAME:GUEST makes: disks that are mounted in guests\nand outlive them.",
		s.createVolume(), s.listVolumes(), s.inspectVolumes(), s.trimVolumes(), s.removeVolumes(), s.pruneVolumes())
}

// onVolumes does something with the volumes of the host.
func (s *Shell) onVolumes(do func(*smartvm.Host, *volume.Store) error) error {
	return s.OnHost(func(h *smartvm.Host) error {
		all, err := h.Volumes()
		if err != nil {
			return err
		}
		return do(h, all.Volumes())
	})
}

// volumeInfo is what is shown of a volume.
type volumeInfo struct {
	volume.Disk
	VMs []string `json:"vms"` // ids of those that have it
}

func infoOf(ctx context.Context, h *smartvm.Host, d volume.Disk) (volumeInfo, error) {
	info := volumeInfo{Disk: d, VMs: []string{}}
	users, err := diskUsers(ctx, h, d.Path)
	for _, u := range users {
		info.VMs = append(info.VMs, u.vm.ID())
	}
	return info, err
}

func (s *Shell) createVolume() *cobra.Command {
	var size vmflags.Memory
	cmd := &cobra.Command{
		Use:     "create [--size SIZE] NAME",
		Short:   "Make a volume",
		Long:    "Make a volume. Without this, run -v NAME:GUEST makes it.",
		Example: "  smartvm volume create --size 50G db",
		Args:    s.Takes(1, 1, "a name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.onVolumes(func(_ *smartvm.Host, all *volume.Store) error {
				d, err := all.Create(cmd.Context(), args[0], int64(cmp.Or(size, spec.DefaultVolumeMiB))<<20)
				if err != nil {
					return s.Invalid(err)
				}
				if s.JSON() {
					return s.WriteJSON(d)
				}
				_, err = fmt.Fprintln(s.Stdout, d.Name)
				return err
			})
		},
	}
	cmd.Flags().Var(&size, "size",
		fmt.Sprintf("how large the guest sees it: `size` in MiB, or like 512M or 10G (default %dG)",
			spec.DefaultVolumeMiB>>10))
	return cmd
}

func (s *Shell) listVolumes() *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the volumes",
		Long:    "List the volumes and the VMs that have them.\n\nThe fields of -o json: name, path, size, used (bytes), vms (ids).",
		Args:    s.Takes(0, 0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.onVolumes(func(h *smartvm.Host, all *volume.Store) error {
				list, err := all.List()
				if err != nil {
					return err
				}
				infos, rows := []volumeInfo{}, []string(nil)
				for _, d := range list {
					info, err := infoOf(cmd.Context(), h, d)
					if err != nil {
						return err
					}
					infos = append(infos, info)
					rows = append(rows,
						fmt.Sprintf("%s\t%s\t%s\t%s", d.Name, human.Size(d.Size), human.Size(d.Used),
							cmp.Or(strings.Join(info.VMs, " "), "-")))
				}
				if s.JSON() {
					return s.WriteJSON(infos)
				}
				return s.Table("NAME\tSIZE\tUSED\tVMS", rows)
			})
		},
	}
}

func (s *Shell) inspectVolumes() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect NAME...",
		Short: "Show volumes as JSON",
		Long:  "Show volumes as JSON.\n\nThe fields: name, path, size, used (bytes), vms (ids).",
		Args:  s.Takes(1, -1, "a name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.onVolumes(func(h *smartvm.Host, all *volume.Store) error {
				infos := []volumeInfo{}
				for _, name := range args {
					d, err := all.Find(name)
					if err != nil {
						return s.Invalid(err)
					}
					info, err := infoOf(cmd.Context(), h, d)
					if err != nil {
						return err
					}
					infos = append(infos, info)
				}
				return s.WriteJSON(infos)
			})
		},
	}
}

func (s *Shell) trimVolumes() *cobra.Command {
	return s.trim("NAME...", "a name", func(h *smartvm.Host, name string) (string, error) {
		all, err := h.Volumes()
		if err != nil {
			return "", err
		}
		d, err := all.Volumes().Find(name)
		return d.Path, err
	})
}

func (s *Shell) removeVolumes() *cobra.Command {
	return s.remove("volumes", "-v NAME:GUEST", (*volume.Store).Volumes)
}

func (s *Shell) pruneVolumes() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "prune --all",
		Short: "Remove the volumes of no VM",
		Long:  "Remove the volumes that no VM has, with all that is on them.",
		Args:  s.Takes(0, 0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !all {
				return s.Usage(errors.New("volume prune: --all is needed"),
					"each volume has been given a name, so it may be wanted when no VM has it; --all removes it then")
			}
			return s.onVolumes(func(h *smartvm.Host, all *volume.Store) error {
				list, err := all.List()
				if err != nil {
					return err
				}
				var names []string
				for _, d := range list {
					if users, err := diskUsers(cmd.Context(), h, d.Path); err != nil {
						return err
					} else if len(users) == 0 {
						names = append(names, d.Name)
					}
				}
				o := volume.Options{InUse: unread(cmd.Context(), h, true)} // a VM may have got it meanwhile
				return s.Each(cmd.Context(), names, func(_ context.Context, name string) (any, error) {
					return map[string]string{"name": name}, all.Remove(name, o)
				})
			})
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "all of them, whatever is on them")
	return cmd
}
