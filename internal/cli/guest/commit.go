package guest

import (
	"fmt"

	"github.com/spf13/cobra"

	"push.rocks/smartvm/image/give"
	"push.rocks/smartvm/internal/cli/change"
)

func (s *Shell) commit() *cobra.Command {
	var o give.CommitOptions
	var runs change.Flags
	cmd := &cobra.Command{
		Use:   "commit [flags] VM IMAGE",
		Short: "Make an image of a VM",
		Long: "Make an image of the one that a VM runs and of what it has written, as its\n" +
			"uppermost layer, and print its name. Programs of a VM that runs stand still\n" +
			"meanwhile. Files that say who the VM is (/etc/hostname, hosts, machine-id,\n" +
			"resolv.conf), volumes, and what is on other disks are not in it.\n\n" +
			"What the image runs is said as in a Dockerfile: --cmd and --entrypoint take a\n" +
			"JSON array of arguments, or a line for /bin/sh -c.",
		Example: "  smartvm commit web team/web:2\n" +
			"  smartvm commit --cmd '[\"/srv/app\"]' -m 'app 1.3' build app:1.3",
		Args:              s.Takes(2, 2, "a VM and the image's name"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, m, err := s.One(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer h.Close()
			images, err := h.Images()
			if err != nil {
				return err
			}
			o.Name, o.Change, o.Image = args[1], runs.Of(cmd), m.Spec().Image
			for _, d := range m.Spec().Drives {
				if d.IsRootDevice {
					o.Root = d.PathOnHost
				}
			}
			o.Read = m.ReadScratch
			made, err := give.Commit(cmd.Context(), images, o)
			if err != nil {
				return err
			}
			if s.JSON() {
				in, err := images.Inspect(made.Name)
				if err != nil {
					return err
				}
				return s.WriteJSON(in)
			}
			_, err = fmt.Fprintln(s.Stdout, made.Name)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Author, "author", "", "`author` of the image")
	f.StringVarP(&o.Comment, "message", "m", "", "`text` for the image's history")
	runs.Add(f)
	return cmd
}
