package cli

import (
	"github.com/spf13/cobra"

	"push.rocks/smartvm/internal/cli/help"
)

// newHelp is the help command, which refuses what there is not.
func newHelp() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Tell more about a command",
		RunE: func(cmd *cobra.Command, args []string) error {
			about, rest, err := cmd.Root().Find(args)
			if err != nil || about == cmd.Root() && len(rest) > 0 {
				return unknownCommand(cmd.Root(), args[0])
			}
			help.Show(about, nil)
			return nil
		},
	}
}
