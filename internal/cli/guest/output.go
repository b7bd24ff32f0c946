package guest

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
)

// Output passes on what a guest puts out, as it is.
type Output struct {
	To        io.Writer
	First     func()                  // called before anything is written
	Broken    context.CancelCauseFunc // told when it cannot be
	LineEnded bool

	used atomic.Bool
}

// Also is another of the same, to elsewhere.
func (o *Output) Also(to io.Writer) *Output { return &Output{To: to, First: o.First, Broken: o.Broken} }

// Used says whether there was anything.
func (o *Output) Used() bool { return o.used.Load() }

func (o *Output) Write(p []byte) (int, error) {
	o.First()
	o.used.Store(true)
	n, err := o.To.Write(p)
	if err != nil {
		o.Broken(fmt.Errorf("show console: %w", err))
	}
	o.LineEnded = n > 0 && p[n-1] == '\n'
	return n, err
}
