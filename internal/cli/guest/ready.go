package guest

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/vmflags"
)

// defaultWait is how long --wait waits.
const defaultWait = 60 // seconds

// Wait is how long a guest may take to be ready, 0 if nobody waits for that.
type Wait vmflags.Seconds

// Flag adds --wait. When begins what is said of it.
func (w *Wait) Flag(cmd *cobra.Command, when string) {
	f := cmd.Flags()
	f.Var((*vmflags.Seconds)(w), "wait",
		fmt.Sprintf(when+"return when the guest is ready, at most `seconds` later (%d without a number)", defaultWait))
	f.Lookup("wait").NoOptDefVal = strconv.Itoa(defaultWait)
}

// Ready waits for a guest, if that is asked for, and says how it came there. One that does not
// become ready in time is an error with the last of its console; its VM runs on.
func (s *Shell) Ready(ctx context.Context, m *smartvm.Machine, w Wait) (*smartvm.GuestState, error) {
	if w == 0 {
		return nil, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Duration(w), fmt.Errorf("it has had %s", time.Duration(w)))
	defer cancel()
	defer s.Status(human.Doing("waiting for " + m.ID()))()
	return m.AwaitReady(ctx)
}
