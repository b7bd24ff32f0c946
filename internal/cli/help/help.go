// Package help shows what commands do.
package help

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// width is that of the terminals that help is laid out for, in columns.
const width = 80

// Show shows what a command does, without the templates of cobra, which would keep the linker from
// leaving out unused code.
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
	fmt.Fprintf(w, "Usage:  %s\n\n%s\n", use, wrap(text))
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

// wrap breaks the lines of paragraphs that have one that is too wide. Lines that begin with a blank
// stay.
func wrap(text string) string {
	var out, paragraph []string
	end := func() {
		if slices.ContainsFunc(paragraph, func(line string) bool { return utf8.RuneCountInString(line) > width }) {
			paragraph = fill(strings.Fields(strings.Join(paragraph, " ")))
		}
		out, paragraph = append(out, paragraph...), nil
	}
	for _, line := range strings.Split(text, "\n") {
		if line == "" || line[0] == ' ' {
			end()
			out = append(out, line)
			continue
		}
		paragraph = append(paragraph, line)
	}
	end()
	return strings.Join(out, "\n")
}

// fill makes lines of words.
func fill(words []string) (lines []string) {
	line := ""
	for _, word := range words {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
			lines, line = append(lines, line), ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}
