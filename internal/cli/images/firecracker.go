package images

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image/release"
	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/human"
)

func (s *Shell) firecracker() *cobra.Command {
	return s.Group("firecracker", "Install and remove Firecracker",
		"Install and remove versions of Firecracker and its jailer. VMs get the one that\n"+
			"--firecracker names, else the one in PATH, else the newest installed.",
		s.install(), s.listBinaries(), s.removeBinaries())
}

// binaries opens the versions of Firecracker.
func (s *Shell) binaries() (*release.Store, error) {
	h, err := s.Host()
	if err != nil {
		return nil, err
	}
	binaries, err := h.Binaries()
	return binaries, errors.Join(err, h.Close())
}

func (s *Shell) install() *cobra.Command {
	return &cobra.Command{
		Use:   "install [VERSION]",
		Short: "Fetch a version of Firecracker, without VERSION the newest",
		Long: "Fetch a release of Firecracker and its jailer, compare it with the digest that\n" +
			"comes with it, and install both beside the images. Versions do not get into\n" +
			"each other's way.",
		Example: "  smartvm firecracker install v1.12.1",
		Args:    s.Takes(0, 1, "one version"),
		RunE: func(cmd *cobra.Command, args []string) error {
			binaries, err := s.binaries()
			if err != nil {
				return err
			}
			version := ""
			if len(args) > 0 {
				version = args[0]
			}
			done := s.Status(s.Transfer.Text)
			b, err := binaries.Install(cmd.Context(), version)
			done()
			if err != nil {
				return s.Invalid(err)
			}
			if s.JSON() {
				return s.WriteJSON(b)
			}
			_, err = fmt.Fprintln(s.Stdout, b.Firecracker)
			return err
		},
	}
}

func (s *Shell) listBinaries() *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the versions that are installed",
		Args:    s.Takes(0, 0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			binaries, err := s.binaries()
			if err != nil {
				return err
			}
			all, err := binaries.List()
			if err != nil {
				return err
			}
			if s.JSON() {
				return s.WriteJSON(append([]release.Binary{}, all...))
			}
			var rows []string
			for _, b := range all {
				rows = append(rows, b.Version+"\t"+b.Firecracker)
			}
			return s.Table("VERSION\tPATH", rows)
		},
	}
}

func (s *Shell) removeBinaries() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm [flags] VERSION...",
		Short: "Remove versions",
		Long:  "Remove versions of Firecracker. One with which a VM was made is not removed.",
		Args:  s.Takes(1, -1, "a version"),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := s.Host()
			if err != nil {
				return err
			}
			defer h.Close()
			binaries, err := h.Binaries()
			if err != nil {
				return err
			}
			vms, err := h.Machines(cmd.Context())
			if err != nil {
				return err
			}
			return s.Each(cmd.Context(), args, func(ctx context.Context, version string) (any, error) {
				b, err := binaries.Find(version)
				if err != nil {
					return nil, s.Invalid(err)
				}
				for _, m := range vms {
					if m.Firecracker() == b.Firecracker && !force {
						return nil, fmt.Errorf("remove Firecracker %s: VM %s was made with it", b.Version, m.ID())
					}
				}
				return b, binaries.Remove(b.Version)
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "remove it even so: what runs goes on, what is stopped cannot start")
	return cmd
}

func (s *Shell) df() *cobra.Command {
	return &cobra.Command{
		Use:   "df",
		Short: "Show what takes space on disk",
		Long: "Show what images, their layers and disks take on disk, and what smartvm image\n" +
			"prune would free.\n\n" +
			"The fields of -o json: images (number), objects, layers, unused, disks (bytes).",
		Args: s.Takes(0, 0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			images, err := s.store()
			if err != nil {
				return err
			}
			u, err := images.Usage(cmd.Context())
			if err != nil {
				return err
			}
			var disks []volume.Disk
			err = s.OnHost(func(h *smartvm.Host) error {
				all, err := h.Volumes()
				if err != nil {
					return err
				}
				kept, err := all.List()
				mounted, mountedErr := all.Volumes().List()
				disks = append(kept, mounted...)
				return errors.Join(err, mountedErr)
			})
			if err != nil {
				return err
			}
			var used int64
			for _, d := range disks {
				used += d.Used
			}
			if s.JSON() {
				return s.WriteJSON(
					map[string]any{"images": u.Images, "objects": u.Objects, "layers": u.Layers, "unused": u.Unused, "disks": used})
			}
			return s.Table("WHAT\tNUMBER\tSIZE", []string{
				fmt.Sprintf("images\t%d\t%s", u.Images, human.Size(u.Objects)),
				fmt.Sprintf("layers, kept for other images\t\t%s", human.Size(u.Layers)),
				fmt.Sprintf("of these, not needed by any image\t\t%s", human.Size(u.Unused)),
				fmt.Sprintf("disks and volumes with names\t%d\t%s", len(disks), human.Size(used)),
			})
		},
	}
}
