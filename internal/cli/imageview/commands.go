package imageview

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/oci/config"
)

// Shell is what the commands need of the command line that they are part of.
type Shell struct {
	Stdout io.Writer
	JSON   func() bool
	Store  func() (*image.Store, error)
	// Usage makes the error of a command line that makes no sense.
	Usage     func(err error, hint string) error
	Takes     func(least, most int, what string) cobra.PositionalArgs
	WriteJSON func(v any) error
	Table     func(heading string, rows []string) error
	// Warn says what is no failure.
	Warn func(err error)
}

// Commands are ls, inspect and history.
func (s *Shell) Commands() []*cobra.Command {
	return []*cobra.Command{s.list(), s.inspect(), s.history()}
}

func (s *Shell) list() *cobra.Command {
	var quiet, digests, whole bool
	var filters []string
	var format string
	cmd := &cobra.Command{
		Use:     "ls [flags]",
		Aliases: []string{"list"},
		Short:   "List images",
		Long: "List the images that are here. SIZE is what an image takes on disk, also of\n" +
			"what it shares with others.\n\n" +
			"--filter takes label=NAME, label=NAME=VALUE, label!=..., reference=PATTERN,\n" +
			"before=IMAGE, since=IMAGE and until=TIME (24h: it came here longer ago; or a\n" +
			"date), all of which must be met. --format is a template of Go for each\n" +
			"image, with .Name .ID .Digest .Content .Size .Created .Platform .Author .Labels\n" +
			".VMs and json.\n\n" +
			"The fields of -o json are those of smartvm image inspect.",
		Example: "  smartvm image ls --filter reference='debian*' --format '{{.Name}} {{.ID}}'",
		Args:    s.Takes(0, 0, "flags only"),
		RunE: func(*cobra.Command, []string) error {
			t, err := Template(format)
			if err != nil {
				return s.Usage(err, "")
			}
			images, err := s.Store()
			if err != nil {
				return err
			}
			list, err := s.all(images)
			if err != nil {
				return err
			}
			meets, err := Filter(filters, images.Find)
			if errors.Is(err, ErrFilter) {
				return s.Usage(err, "")
			} else if err != nil {
				return err
			}
			list = slices.DeleteFunc(list, func(in *image.Inspection) bool { return !meets(&in.Image) })
			switch {
			case quiet:
				for _, in := range list {
					fmt.Fprintln(s.Stdout, in.Name)
				}
				return nil
			case format != "":
				return Format(s.Stdout, t, list, whole)
			case s.JSON():
				return s.WriteJSON(list)
			}
			return s.Table(Table(list, digests, whole))
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.BoolVarP(&quiet, "quiet", "q", false, "print names only")
	f.BoolVar(&digests, "digests", false, "show digests")
	f.BoolVar(&whole, "no-trunc", false, "show ids in full")
	f.StringArrayVar(&filters, "filter", nil, "show only images that meet a `filter`")
	f.StringVar(&format, "format", "", "print a `template` for each image")
	return cmd
}

// all inspects all images. What cannot be read is warned of.
func (s *Shell) all(images *image.Store) ([]*image.Inspection, error) {
	all, err := images.List()
	if err != nil {
		s.Warn(err)
	}
	list := []*image.Inspection{}
	for _, i := range all {
		in, err := images.Inspect(i.Name)
		if errors.Is(err, image.ErrNotFound) {
			continue // meanwhile
		}
		if err != nil {
			return nil, err
		}
		list = append(list, in)
	}
	return list, nil
}

func (s *Shell) inspect() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "inspect [flags] IMAGE...",
		Short: "Show all about images",
		Long: "Show all that is known about images, as a JSON array: name, id, digest, where it\n" +
			"came from, its parts, what it says of itself (labels, author, history, platform)\n" +
			"and wants to be run as, and the VMs that use it.",
		Args: s.Takes(1, -1, "an image"),
		RunE: func(_ *cobra.Command, args []string) error {
			t, err := Template(format)
			if err != nil {
				return s.Usage(err, "")
			}
			images, err := s.Store()
			if err != nil {
				return err
			}
			list := []*image.Inspection{}
			var errs []error
			for _, name := range args {
				in, err := images.Inspect(name)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				list = append(list, in)
			}
			if format != "" {
				return errors.Join(append(errs, Inspect(s.Stdout, t, list))...)
			}
			return errors.Join(append(errs, s.WriteJSON(list))...)
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "print a `template` for each, such as '{{.Config.Labels.version}}'")
	return cmd
}

func (s *Shell) history() *cobra.Command {
	var whole bool
	cmd := &cobra.Command{
		Use:   "history [flags] IMAGE",
		Short: "Show how an image was made",
		Long: "Show the steps by which an image was made, as it says, the newest first. SIZE is\n" +
			"that of a layer as it is fetched.",
		Args: s.Takes(1, 1, "an image"),
		RunE: func(_ *cobra.Command, args []string) error {
			images, err := s.Store()
			if err != nil {
				return err
			}
			i, err := images.Find(args[0])
			if err != nil {
				return err
			}
			if s.JSON() {
				return s.WriteJSON(append([]config.Step{}, i.About.History...))
			}
			return s.Table(History(i.About.History, whole))
		},
	}
	cmd.Flags().BoolVar(&whole, "no-trunc", false, "show commands in full")
	return cmd
}
