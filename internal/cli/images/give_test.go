package images_test

import (
	"io"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"push.rocks/smartvm/internal/cli/images"
)

// An image is not written to a terminal.
func TestSave_Terminal(t *testing.T) {
	var hinted string
	s := &images.Shell{
		Stdout: io.Discard, Stderr: io.Discard, Screen: func() bool { return true },
		Registry: func(*cobra.Command) {},
		Usage:    func(err error, hint string) error { hinted = hint; return err },
		Takes:    func(int, int, string) cobra.PositionalArgs { return cobra.ArbitraryArgs },
	}
	root := &cobra.Command{Use: "smartvm", SilenceErrors: true, SilenceUsage: true}
	root.AddCommand(s.Commands()...)
	root.SetArgs([]string{"image", "save", "app"})
	if err := root.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "terminal") ||
		hinted != "smartvm image save -o FILE app" {
		t.Errorf("%v, hint %q", err, hinted)
	}
}
