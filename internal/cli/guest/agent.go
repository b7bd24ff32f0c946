package guest

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"push.rocks/smartvm/internal/agentbin"
)

// unit is the agent as a service of systemd.
const unit = `[Unit]
Description=smartvm's agent: exec, cp and the like from the VM's host
DefaultDependencies=no
After=systemd-remount-fs.service
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStartPre=-/sbin/modprobe vmw_vsock_virtio_transport
ExecStart=/usr/local/sbin/smartvm-agent serve
Restart=always
RestartSec=1
KillMode=process
OOMScoreAdjust=-900

[Install]
WantedBy=sysinit.target
`

func (s *Shell) agent() *cobra.Command {
	var asUnit bool
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Write the guest's agent to standard output",
		Long: "Write smartvm-agent, the guest's side of exec, cp and the like, to standard output.\n\n" +
			"VMs of images have it. A guest that boots by itself, with its own kernel and root\n" +
			"file system, answers too if it runs smartvm-agent serve as a service, as root, and the VM\n" +
			"has a vsock device (--vsock). It needs nothing else of the guest.",
		Example: "  smartvm agent >root/usr/local/sbin/smartvm-agent\n" +
			"  chmod 755 root/usr/local/sbin/smartvm-agent\n" +
			"  smartvm agent --unit >root/etc/systemd/system/smartvm-agent.service\n" +
			"  systemctl --root root enable smartvm-agent",
		Args: s.Takes(0, 0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			if asUnit {
				_, err := fmt.Fprint(s.Stdout, unit)
				return err
			}
			data := agentbin.Agent()
			if data == nil {
				return errors.New("this smartvm was built without an agent: make builds both")
			}
			if f, ok := s.Stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
				return s.Usage(errors.New("a program is not for a terminal"), "smartvm agent >smartvm-agent")
			}
			_, err := s.Stdout.Write(data)
			return err
		},
	}
	cmd.Flags().BoolVar(&asUnit, "unit", false, "the unit for systemd that runs it, instead")
	return cmd
}
