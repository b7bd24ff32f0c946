// Package images is the part of the command line that is about images, networks and Firecracker
// itself: a group of commands each.
package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
)

// Shell is what the commands need of the command line that they are part of.
type Shell struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	JSON           func() bool
	Terminal       func() bool // somebody looks at Stderr
	Screen         func() bool // Stdout is a terminal
	// Status shows what is going on, until done.
	Status func(text func(time.Duration) string) (done func())
	// Host opens the host as it is. The caller closes it.
	Host func() (*smartvm.Host, error)
	// Usage makes the error of a command line that makes no sense.
	Usage func(err error, hint string) error
	// Takes checks the number of arguments.
	Takes func(least, most int, what string) cobra.PositionalArgs
	// Registry adds the flags of commands that ask registries.
	Registry func(cmd *cobra.Command)
	// WriteJSON writes a document to Stdout.
	WriteJSON func(v any) error

	Transfer human.Transfer // what Progress was told last
	mu       sync.Mutex     // of what follows, and of Stderr while there is progress
	step     string
	begun    time.Time // of the step
	told     time.Time // when it was last heard of

	opened []*smartvm.Host // what Close closes
}

// Commands are the groups.
func (s *Shell) Commands() []*cobra.Command {
	return []*cobra.Command{s.image(), s.network(), s.firecracker(), s.df()}
}

// Group is a command that only has others below it.
func (s *Shell) Group(use, short, long string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Long: long,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return s.Usage(fmt.Errorf("%s has no command %q", cmd.CommandPath(), args[0]),
					cmd.CommandPath()+" --help lists them")
			}
			return cmd.Help()
		},
	}
	c.AddCommand(commands...)
	return c
}

// Progress is told how far a step is. On a terminal it is for Status; else there is a line for each
// step and now and then; with -o json each is an object on standard error.
func (s *Shell) Progress(step string, done, total int64) {
	s.Transfer.Set(step, done, total)
	if s.Terminal() && !s.JSON() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now, whole := time.Now(), total > 0 && done >= total
	if step != s.step {
		s.step, s.begun, s.told = step, now, time.Time{}
	}
	// What is over within a second is not worth a line.
	if now.Sub(s.begun) < plainDelay && !s.JSON() || now.Sub(s.told) < plainEvery && !whole {
		return
	}
	s.told = now
	if whole { // the same step may come again
		s.step = ""
	}
	if s.JSON() {
		s.event(map[string]any{"event": "progress", "step": step, "done": done, "total": total})
		return
	}
	if total > 0 {
		fmt.Fprintf(s.Stderr, "%s: %s of %s\n", step, human.Size(done), human.Size(total))
	} else {
		fmt.Fprintf(s.Stderr, "%s: %s\n", step, human.Size(done))
	}
}

// How a step is heard of without a terminal.
const (
	plainDelay = time.Second
	plainEvery = 5 * time.Second
)

// Waiting is told for what another process is waited for.
func (s *Shell) Waiting(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.JSON() {
		s.event(map[string]any{"event": "waiting", "for": what})
		return
	}
	fmt.Fprintf(s.Stderr, "smartvm: waiting for %s\n", what)
}

// Installed is told what was fetched without being asked for, and where it is.
func (s *Shell) Installed(what, path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.JSON():
		s.event(map[string]any{"event": "installed", "what": what, "path": path})
	case s.Terminal():
		fmt.Fprintf(s.Stderr, "\r\x1b[Kinstalled %s: %s\n", what, path) // over what Status shows
	default:
		fmt.Fprintf(s.Stderr, "installed %s: %s\n", what, path)
	}
}

// note says something that is no failure.
func (s *Shell) note(event, format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	text := fmt.Sprintf(format, args...)
	if s.JSON() {
		s.event(map[string]any{"event": event, "message": text})
		return
	}
	fmt.Fprintf(s.Stderr, "smartvm: %s\n", text)
}

func (s *Shell) event(e map[string]any) {
	data, err := json.Marshal(e)
	if err == nil {
		fmt.Fprintf(s.Stderr, "%s\n", data)
	}
}

// OnHost does something with the host.
func (s *Shell) OnHost(do func(*smartvm.Host) error) error {
	h, err := s.Host()
	if err != nil {
		return err
	}
	return errors.Join(do(h), h.Close())
}

// Table writes rows with their heading.
func (s *Shell) Table(heading string, rows []string) error {
	w := tabwriter.NewWriter(s.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, heading)
	for _, row := range rows {
		fmt.Fprintln(w, row)
	}
	return w.Flush()
}

// Each does something to each name, and says of which it went well. What do returns is for -o json.
func (s *Shell) Each(ctx context.Context, names []string,
	do func(ctx context.Context, name string) (any, error),
) error {
	good := []any{}
	var errs []error
	for _, name := range names {
		result, err := do(ctx, name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		good = append(good, result)
		if !s.JSON() {
			fmt.Fprintln(s.Stdout, name)
		}
	}
	if s.JSON() {
		errs = append(errs, s.WriteJSON(good))
	}
	return errors.Join(errs...)
}
