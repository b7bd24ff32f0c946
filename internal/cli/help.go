package cli

import (
	"fmt"

	"github.com/spf13/cobra"
)

// helpWidth is that of the terminals that help is laid out for, in columns.
const helpWidth = 80

// help shows what a command does, without the templates of cobra, which would keep the linker from leaving out unused code.
func help(cmd *cobra.Command, _ []string) {
	w := cmd.OutOrStdout()
	text := cmd.Long
	if text == "" {
		text = cmd.Short
	}
	use := cmd.UseLine()
	if cmd.HasAvailableSubCommands() {
		use = cmd.CommandPath() + " [flags] COMMAND"
	}
	fmt.Fprintf(w, "Usage:  %s\n\n%s\n", use, text)
	if cmd.Example != "" {
		fmt.Fprintf(w, "\nExamples:\n%s\n", cmd.Example)
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintln(w, "\nCommands:")
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() {
				fmt.Fprintf(w, "  %-12s %s\n", sub.Name(), sub.Short)
			}
		}
	}
	if cmd.HasAvailableLocalFlags() {
		flags := cmd.LocalFlags()
		flags.SortFlags = false
		fmt.Fprintf(w, "\nFlags:\n%s", flags.FlagUsagesWrapped(helpWidth))
	}
	switch {
	case cmd.HasAvailableSubCommands():
		fmt.Fprintf(w, "\n%s COMMAND --help tells more about a command.\n", cmd.CommandPath())
	case cmd.HasAvailableInheritedFlags():
		fmt.Fprintf(w, "\n%s --help lists the flags that every command has.\n", cmd.Root().Name())
	}
}

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
			help(about, nil)
			return nil
		},
	}
}
