package images

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"push.rocks/smartvm/image/give"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/stream"
)

func (s *Shell) save() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "save [flags] IMAGE",
		Short: "Write an image to a file, or to standard output",
		Long: "Write an image as a tar that smartvm image pull, docker load, podman load and\n" +
			"skopeo read: an OCI archive. A pulled image has the digest that it had, as far\n" +
			"as its layers are here or can be fetched again; an imported one has one layer.\n" +
			"Kernels are not in it.\n\n" +
			"Here -o names the file, as with docker save; without it the tar goes to standard\n" +
			"output.",
		Example: "  smartvm image save -o app.tar app\n" +
			"  smartvm image save app | ssh other smartvm image pull -",
		Args: s.Takes(1, 1, "an image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if file == "" && s.Screen() {
				return s.Usage(errors.New("an image is not for a terminal"), "smartvm image save -o FILE "+args[0])
			}
			images, err := s.store()
			if err != nil {
				return err
			}
			defer s.Status(s.Transfer.Text)()
			ctx := cmd.Context()
			write := func(w io.Writer) error { return give.Save(ctx, images, args[0], w) }
			if file == "" || file == "-" {
				return stream.OrLeave(ctx, func() error { return write(s.Stdout) })
			}
			return atomicfile.Fill(file, 0o600, func(f *os.File) error { return write(f) })
		},
	}
	cmd.Flags().StringVarP(&file, "output", "o", "", "`file` to write; - is standard output")
	return cmd
}

func (s *Shell) push() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "push [flags] IMAGE [REFERENCE]",
		Short: "Send an image to a registry",
		Long: "Send an image to a registry, under the name that it has here or another, with\n" +
			"the logins of docker and podman, and print where it is and its digest. What the\n" +
			"registry has is not sent. A pulled image has the digest that it had, as far as\n" +
			"its layers are here or can be fetched again; an imported one has one layer.\n" +
			"Kernels are not sent.",
		Example: "  smartvm image push app registry.example/team/app:2\n" +
			"  smartvm image tag app registry.example/team/app:2\n" +
			"  smartvm image push registry.example/team/app:2",
		Args: s.Takes(1, 2, "an image, and where it is sent"),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := s.store()
			if err != nil {
				return err
			}
			args = append(args, "")
			done := s.Status(s.Transfer.Text)
			pushed, err := give.Push(cmd.Context(), images, args[0], args[1])
			done()
			if err != nil {
				return err
			}
			if s.JSON() {
				return s.WriteJSON(pushed)
			}
			_, err = fmt.Fprintf(s.Stdout, "%s@%s\n", pushed.Reference, pushed.Digest)
			return err
		},
	}
	s.Registry(cmd)
	return cmd
}
