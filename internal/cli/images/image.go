package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/internal/cli/change"
	"push.rocks/smartvm/internal/cli/imageview"
	"push.rocks/smartvm/internal/human"
)

func (s *Shell) image() *cobra.Command {
	return s.Group("image", "Fetch, make and remove images",
		"Fetch, make and remove images: what smartvm run IMAGE boots. An image is stored\n"+
			"once, however many names it has and VMs use it, and no VM ever writes it.",
		append(s.views(), s.pull(), s.importImage(), s.tag(), s.save(), s.push(), s.remove(), s.prune(), s.verify())...)
}

// store opens the images. Close waits until what is done to them is among the events.
func (s *Shell) store() (*image.Store, error) {
	h, err := s.Host()
	if err != nil {
		return nil, err
	}
	s.opened = append(s.opened, h)
	return h.Images()
}

// Close closes what the commands have opened.
func (s *Shell) Close() error {
	var errs []error
	for _, h := range s.opened {
		errs = append(errs, h.Close())
	}
	return errors.Join(errs...)
}

func (s *Shell) pull() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "pull [flags] IMAGE",
		Short: "Fetch an image",
		Long: "Fetch an image and print its name. IMAGE is one of\n" +
			"  debian:12, HOST/NAME:TAG, NAME@sha256:...   a registry's, as with docker\n" +
			"  oci:DIR[:TAG]                               an OCI layout\n" +
			"  docker-archive:FILE[:NAME]                  by docker save; oci-archive: too\n" +
			"  dir:DIR                                     what skopeo writes\n" +
			"  -                                           either, as a tar on standard input\n" +
			"  base:latest, base:lts, base:hosted          Firecracker's own images, or yours\n\n" +
			"What is here already is not fetched again. After an interruption, do the same\n" +
			"again: it goes on where it was.",
		Example: "  smartvm image pull debian:12\n" +
			"  docker save app | smartvm image pull --name app -",
		Args: s.Takes(1, 1, "one image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := s.store()
			if err != nil {
				return err
			}
			i, err := s.Pull(cmd.Context(), images, args[0], name)
			if err != nil {
				return err
			}
			return s.made(i)
		},
	}
	cmd.Flags().SortFlags = false
	cmd.Flags().StringVar(&name, "name", "", "what it is `called` here, if not as there")
	s.Registry(cmd)
	return cmd
}

// Pull fetches an image and shows how far that is.
func (s *Shell) Pull(ctx context.Context, images *image.Store, ref, name string) (*image.Image, error) {
	done := s.Status(s.Transfer.Text)
	i, err := images.Pull(ctx, ref, name)
	done()
	if err == nil {
		s.replaced(i)
	}
	return i, s.Invalid(err)
}

// replaced says that a name stood for another image before: an archive names itself.
func (s *Shell) replaced(i *image.Image) {
	if old := i.Replaced; old != nil {
		s.note("replaced", "%s is now image %.12s in place of %.12s, which came from %s", i.Name, i.ID, old.ID,
			human.Printable(old.Source))
	}
}

// Invalid makes a usage error of one that is the caller's.
func (s *Shell) Invalid(err error) error {
	if err != nil && errors.Is(err, fs.ErrInvalid) {
		return s.Usage(err, smartvm.Hint(err))
	}
	return err
}

// made tells the name of an image.
func (s *Shell) made(i *image.Image) error {
	if s.JSON() {
		return s.WriteJSON(i)
	}
	_, err := fmt.Fprintln(s.Stdout, i.Name)
	return err
}

func (s *Shell) importImage() *cobra.Command {
	var o image.ImportOptions
	var runs change.Flags
	cmd := &cobra.Command{
		Use:   "import [flags] NAME",
		Short: "Make an image of files",
		Long: "Make an image of files of this machine: a kernel, a root file system, or both.\n\n" +
			"The kernel is a vmlinux, bzImage, arm64 Image or EFI image of any distribution,\n" +
			"with its modules; \"host\" is the one that this machine runs. An image of a\n" +
			"kernel alone lends it to images without: run --kernel NAME, or to all of them if\n" +
			"it is called \"kernel\".\n\n" +
			"The root file system is a directory, a tar, or an ext4, squashfs or erofs image.\n" +
			"What it runs is said as in a Dockerfile: --cmd and --entrypoint take a JSON\n" +
			"array of arguments, or a line for /bin/sh -c.",
		Example: "  smartvm image import --kernel host kernel\n" +
			"  smartvm image import --kernel vmlinuz --modules lib/modules/6.1.0-40 kernel\n" +
			"  mmdebstrap bookworm - | smartvm image import --rootfs - debian\n" +
			"  smartvm image import --rootfs app.tar --cmd '[\"/bin/app\", \"-v\"]' --env A=b app",
		Args: s.Takes(1, 1, "the image's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := s.store()
			if err != nil {
				return err
			}
			o.Name, o.Stdin, o.Runs = args[0], s.Stdin, runs.Of(cmd)
			done := s.Status(s.Transfer.Text)
			i, err := images.Import(cmd.Context(), o)
			done()
			if err != nil {
				return s.Invalid(err)
			}
			s.replaced(i)
			return s.made(i)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVarP(&o.Kernel, "kernel", "k", "", "vmlinux, bzImage, arm64 Image or EFI image at `path`, or host")
	f.StringVar(&o.Modules, "modules", "",
		"the kernel's /lib/modules/RELEASE, a `dir`; without it what guests need is built in")
	f.StringVar(&o.Rootfs, "rootfs", "", "root file system at `path`, - for a tar on standard input")
	f.StringVar(&o.Initrd, "initrd", "", "initramfs at `path` that boots by itself")
	f.StringVar(&o.BootArgs, "append", "", "kernel command `line`")
	runs.Add(f)
	return cmd
}

// views are the commands that show images.
func (s *Shell) views() []*cobra.Command {
	v := &imageview.Shell{
		Stdout: s.Stdout, JSON: s.JSON, Store: s.store, Usage: s.Usage, Takes: s.Takes, WriteJSON: s.WriteJSON,
		Table: s.Table,
		Warn:  func(err error) { s.note("warning", "%v", err) },
	}
	return v.Commands()
}

func (s *Shell) tag() *cobra.Command {
	return &cobra.Command{
		Use:     "tag IMAGE NAME",
		Short:   "Give an image one more name",
		Long:    "Give an image one more name, which costs nothing, and print that. What had the\nname has it no more.",
		Example: "  smartvm image tag debian:12 base",
		Args:    s.Takes(2, 2, "an image and a name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := s.store()
			if err != nil {
				return err
			}
			i, err := images.Tag(cmd.Context(), args[0], args[1])
			if err != nil {
				return s.Invalid(err)
			}
			s.replaced(i)
			return s.made(i)
		},
	}
}

func (s *Shell) remove() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm [flags] IMAGE...",
		Short: "Remove images",
		Long:  "Remove images, and what only they need. One that VMs use is not removed.",
		Args:  s.Takes(1, -1, "an image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := s.store()
			if err != nil {
				return err
			}
			return s.Each(cmd.Context(), args, func(ctx context.Context, name string) (any, error) {
				return images.Remove(ctx, name, force)
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "take the name away even if VMs use it; they keep what they have")
	return cmd
}

func (s *Shell) prune() *cobra.Command {
	var o image.PruneOptions
	var filters []string
	cmd := &cobra.Command{
		Use:   "prune [flags]",
		Short: "Remove what no image needs",
		Long: "Remove what no image needs any more, and with -a the images that no VM uses. The\n" +
			"layers of a registry's images are kept, so that others that share them need not\n" +
			"fetch them; --layers removes them. No VM needs them.\n\n" +
			"--filter has -a remove only images that meet it: those of smartvm image ls.",
		Example: "  smartvm image prune -a --filter until=240h --filter label!=keep",
		Args:    s.Takes(0, 0, "flags only"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(filters) > 0 && !o.All {
				return s.Usage(errors.New("--filter is about images, which only -a removes"), "")
			}
			images, err := s.store()
			if err != nil {
				return err
			}
			if o.Only, err = imageview.Filter(filters, images.Find); errors.Is(err, imageview.ErrFilter) {
				return s.Usage(err, "")
			} else if err != nil {
				return err
			}
			r, err := images.Prune(cmd.Context(), o)
			if err != nil {
				return err
			}
			if s.JSON() {
				return s.WriteJSON(r)
			}
			for _, name := range r.Images {
				fmt.Fprintln(s.Stdout, name)
			}
			_, err = fmt.Fprintf(s.Stderr, "freed %s\n", human.Size(r.Bytes))
			return err
		},
	}
	cmd.Flags().BoolVarP(&o.All, "all", "a", false, "remove images that no VM uses, too")
	cmd.Flags().StringArrayVar(&filters, "filter", nil, "with -a, remove only images that meet a `filter`")
	cmd.Flags().BoolVar(&o.Layers, "layers", false, "remove the layers that are kept for pulls of other images, too")
	return cmd
}

func (s *Shell) verify() *cobra.Command {
	return &cobra.Command{
		Use:   "verify [IMAGE...]",
		Short: "Read images and compare them with what was stored",
		Long:  "Read images, all without a name, and compare each file with what was stored.",
		Args:  s.Takes(0, -1, "images"),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := s.store()
			if err != nil {
				return err
			}
			var unreadable error
			if len(args) == 0 {
				all, err := images.List()
				for _, i := range all {
					args = append(args, i.Name)
				}
				unreadable = err
			}
			done := s.Status(s.Transfer.Text)
			defer done()
			return errors.Join(unreadable, s.Each(cmd.Context(), args, func(ctx context.Context, name string) (any, error) {
				return name, images.Verify(ctx, name)
			}))
		},
	}
}
