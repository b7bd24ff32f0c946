package guest

import (
	"errors"

	"github.com/spf13/cobra"

	"push.rocks/smartvm/internal/cli/eventview"
)

func (s *Shell) events() *cobra.Command {
	var since, until string
	var filters []string
	cmd := &cobra.Command{
		Use:   "events [flags]",
		Short: "Show what happens to VMs, snapshots, images and networks",
		Long: "Show what happens to VMs, whichever process does it, and to snapshots, images and\n" +
			"networks, until Ctrl-C: created, restored, forked, started, failed, ready,\n" +
			"degraded, paused, resumed, updated, adopted, exited, removed; snapshot, image,\n" +
			"network. The newest one or two MiB are kept.\n\n" +
			"A filter is type=TYPE, vm=VM (id, its beginning, or name), image=NAME, network=NAME\n" +
			"or an attribute, like outcome=killed. If a key is given several times, one of its\n" +
			"values must match; all keys must match.\n\n" +
			"With -o json each is an object in a line of its own, with an id that only grows;\n" +
			"--since takes the last id that was seen.",
		Example: "  smartvm events --filter type=exited --filter type=failed\n" +
			"  smartvm -o json events --since 10m --until 0s",
		Args: s.Takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := eventview.Parse(since, until, filters)
			if err != nil {
				return s.Usage(err, "")
			}
			v.Stdout, v.Stderr, v.JSON = s.Stdout, s.Stderr, s.JSON()
			h, err := s.Open(cmd.Context())
			if err != nil {
				return err
			}
			return errors.Join(v.Show(cmd.Context(), h), h.Close())
		},
	}
	f := cmd.Flags()
	f.StringVar(&since, "since", "", "begin with what happened since a `time`, or so long ago, or after an id")
	f.StringVar(&until, "until", "", "end at a `time`, or so long ago")
	f.StringArrayVar(&filters, "filter", nil, "show only what has this `KEY=VALUE`; may be repeated")
	return cmd
}
