// Package change has the flags of commands that say what an image runs.
package change

import (
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"push.rocks/smartvm/image/oci/config"
)

// Flags say what an image runs.
type Flags struct {
	entrypoint, cmd string
	change          config.Change
}

// Add adds them to a command's.
func (c *Flags) Add(f *pflag.FlagSet) {
	f.StringVar(&c.cmd, "cmd", "", "`command` that it runs")
	f.StringVar(&c.entrypoint, "entrypoint", "", "`command` that its command is given to")
	f.StringArrayVarP(&c.change.Env, "env", "e", nil, "`NAME=VALUE` for what it runs; may be repeated")
	f.StringVarP(&c.change.User, "user", "u", "", "`user` who runs it: NAME or UID, with :GROUP")
	f.StringVarP(&c.change.WorkingDir, "workdir", "w", "", "`directory` that it runs in")
}

// Of is what a command was given.
func (c *Flags) Of(cmd *cobra.Command) config.Change {
	if cmd.Flags().Changed("cmd") {
		c.change.Cmd = &c.cmd
	}
	if cmd.Flags().Changed("entrypoint") {
		c.change.Entrypoint = &c.entrypoint
	}
	return c.change
}
