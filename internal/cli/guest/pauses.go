package guest

import (
	"context"
	"fmt"
	"strings"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/firecracker"
)

// pauseLook is how often a VM in which a program runs is looked at.
const pauseLook = 2 * time.Second

// tellPauses says when the VM is paused, with what runs in it, and when it goes on. The caller
// calls done.
func (s *Shell) tellPauses(ctx context.Context, m *smartvm.Machine, o Streams) (done func()) {
	say := func(format string, args ...any) {
		text := fmt.Sprintf("smartvm: VM "+format+"\n", args...)
		if o.TTY { // which is in raw mode
			text = "\r\n" + strings.ReplaceAll(text, "\n", "\r\n")
		}
		fmt.Fprint(s.Stderr, text)
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(pauseLook)
		defer tick.Stop()
		for paused := false; ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			info, err := m.Info(ctx)
			if err != nil || paused == (info.State == firecracker.StatePaused) {
				continue
			}
			if paused = !paused; paused {
				say("%s is paused, and what runs in it waits: smartvm resume %s", m.ID(), m.ID())
			} else {
				say("%s goes on", m.ID())
			}
		}
	}()
	return func() { cancel(); <-ended }
}
