package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/supervise"
)

// exitStatus is the end of a command that has nothing more to say.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// usageError is a command line that makes no sense.
type usageError struct {
	err  error
	hint string
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }
func (e *usageError) Hint() string  { return e.hint }
func (e *usageError) Code() string  { return "USAGE" }

func usage(format string, args ...any) *usageError {
	return &usageError{err: fmt.Errorf(format, args...)}
}

// advised adds advice to an error.
type advised struct {
	error
	hint string
}

func (e *advised) Unwrap() error { return e.error }
func (e *advised) Hint() string  { return e.hint }

func exitCode(err error) int {
	var u *usageError
	if errors.As(err, &u) || len(supervise.Describe(err).Fields) > 0 {
		return exitUsage
	}
	return exitFailed
}

// report shows what went wrong.
func (a *app) report(err error) {
	if a.json {
		_ = writeJSON(a.Stderr, map[string]any{"error": supervise.Describe(err)})
		return
	}
	var hints []string
	for _, e := range flatten(err) {
		fmt.Fprintf(a.Stderr, "smartvm: %s\n", message(e))
		if hint := smartvm.Hint(e); hint != "" && !slices.Contains(hints, hint) {
			hints = append(hints, hint)
		}
	}
	for _, hint := range hints {
		fmt.Fprintf(a.Stderr, "hint: %s\n", hint)
	}
}

// flatten takes joined errors apart, as long as nothing is said about all of them.
func flatten(err error) []error {
	if err == nil {
		return nil
	}
	joined, ok := err.(interface{ Unwrap() []error }) //nolint:errorlint // only the error itself counts
	if !ok {
		return []error{err}
	}
	var all []error
	var texts []string
	for _, err := range joined.Unwrap() {
		all = append(all, flatten(err)...)
		texts = append(texts, err.Error())
	}
	if strings.Join(texts, "\n") != err.Error() {
		return []error{err}
	}
	return all
}

// flagOf tells which flag sets a field, for those who never saw the file format.
var flagOf = map[string]string{
	"bootSource.kernelImagePath": "--kernel", "bootSource.initrdPath": "--initrd", "bootSource.bootArgs": "--append",
	"machineConfig.vcpuCount": "--cpus", "machineConfig.memSizeMib": "--memory", "id": "--id", "name": "--name",
	"labels": "--label",
}

func message(err error) string {
	text := err.Error()
	e, ok := err.(*smartvm.FieldError) //nolint:errorlint // wrapped, it says more
	switch {
	case ok && e.Path == "$":
		return "configuration: " + e.Reason
	case ok && flagOf[e.Path] != "":
		return strings.Replace(text, e.Path, e.Path+" ("+flagOf[e.Path]+")", 1)
	}
	return text
}

// asDocker are commands that docker has without a group.
var asDocker = map[string]string{
	"pull": "image pull", "images": "image ls", "rmi": "image rm", "tag": "image tag", "import": "image import",
	"history": "image history", "kill": "stop",
}

func unknownCommand(cmd *cobra.Command, name string) error {
	meant := cmd.SuggestionsFor(name)
	if asDocker[name] != "" {
		meant = []string{"smartvm " + asDocker[name]}
	}
	return &usageError{
		err:  fmt.Errorf("unknown command %q", name),
		hint: didYouMean(meant, "", "smartvm --help lists the commands"),
	}
}

func didYouMean(names []string, prefix, otherwise string) string {
	if len(names) == 0 {
		return otherwise
	}
	return "did you mean " + prefix + strings.Join(names, " or "+prefix) + "?"
}

// flagError makes a usage error of what pflag says.
func flagError(cmd *cobra.Command, err error) error {
	see := cmd.CommandPath() + " --help lists the flags"
	if e, ok := errors.AsType[*pflag.NotExistError](err); ok {
		// Flags are looked for as cobra looks for commands.
		names := &cobra.Command{SuggestionsMinimumDistance: 2}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden {
				names.AddCommand(&cobra.Command{Use: f.Name, Run: func(*cobra.Command, []string) {}})
			}
		})
		see = didYouMean(names.SuggestionsFor(e.GetSpecifiedName()), "--", see)
	}
	return &usageError{err: err, hint: see}
}

// takes checks the number of arguments.
func takes(least, most int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		see := cmd.CommandPath() + " --help tells more"
		switch {
		case len(args) < least:
			return &usageError{err: fmt.Errorf("%s needs %s", cmd.CommandPath(), what), hint: see}
		case most >= 0 && len(args) > most:
			return &usageError{err: fmt.Errorf("%s takes %s: %q is too much", cmd.CommandPath(), what, args[most]), hint: see}
		}
		return nil
	}
}

// wantsJSON looks for -o json in a command line that may not parse, so that the error of that is
// JSON too.
func wantsJSON(args []string) bool {
	for i, arg := range args {
		switch arg {
		case "-ojson", "-o=json", "--output=json":
			return true
		case "-o", "--output":
			if i+1 < len(args) && args[i+1] == "json" {
				return true
			}
		case "--":
			return false
		}
	}
	return false
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
