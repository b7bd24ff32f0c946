package cli

import (
	"cmp"
	"fmt"
	"os/exec"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/vmm"
)

type versionCommand struct{ *app }

// versions is what version -o json says.
type versions struct {
	Smartvm     string `json:"smartvm"`
	Go          string `json:"go"`
	Platform    string `json:"platform"`
	Firecracker string `json:"firecracker,omitempty"` // the VMM in use, absent where there is none
	Path        string `json:"firecrackerBinaryPath,omitempty"`
	Unsupported bool   `json:"firecrackerUnsupported,omitempty"` // by upstream, which mends nothing in it any more
}

func newVersion(a *app) *cobra.Command {
	c := &versionCommand{app: a}
	return &cobra.Command{
		Use:   "version",
		Short: "Print the versions of smartvm and the VMM",
		Args:  takes(0, 0, "no arguments"),
		RunE:  c.run,
	}
}

func (c *versionCommand) run(cmd *cobra.Command, _ []string) error {
	v := versions{Smartvm: "unknown", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		v.Smartvm = info.Main.Version
	}
	path, err := exec.LookPath(cmp.Or(c.global.firecracker, "firecracker"))
	if err == nil {
		if version, versionErr := vmm.Version(cmd.Context(), path); versionErr == nil {
			v.Firecracker, v.Path, v.Unsupported = version.String(), path, !version.AtLeast(firecracker.OldestSupported)
		} else {
			err = versionErr
		}
	}
	if c.json {
		return writeJSON(c.Stdout, v)
	}
	fmt.Fprintf(c.Stdout, "smartvm      %s (%s, %s)\n", v.Smartvm, v.Go, v.Platform)
	if err != nil {
		fmt.Fprintf(c.Stdout, "firecracker  none: %v\n", err)
		return nil
	}
	note := ""
	if v.Unsupported {
		note = ", no longer supported upstream"
	}
	fmt.Fprintf(c.Stdout, "firecracker  %s (%s)%s\n", v.Firecracker, v.Path, note)
	return nil
}
