// Package help shows what commands do.
package help

import (
	"fmt"

	"github.com/spf13/cobra"
)

// width is that of the terminals that help is laid out for, in columns.
const width = 80

// Show shows what a command does, without the templates of cobra, which would keep the linker from leaving out unused code.
func Show(cmd *cobra.Command, _ []string) {
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
		fmt.Fprintf(w, "\nFlags:\n%s", flags.FlagUsagesWrapped(width))
	}
	switch {
	case cmd.HasAvailableSubCommands():
		fmt.Fprintf(w, "\n%s COMMAND --help tells more about a command.\n", cmd.CommandPath())
	case cmd.HasAvailableInheritedFlags():
		fmt.Fprintf(w, "\n%s --help lists the flags that every command has.\n", cmd.Root().Name())
	}
}
