package agent

import (
	"io"
	"sync"

	"push.rocks/smartvm/guest"
)

// Tee is cmd with all its output written to w, too. Errors of w are ignored.
func Tee(cmd guest.Cmd, w io.Writer) guest.Cmd {
	both := &shared{to: w}
	for _, out := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
		if *out == nil {
			*out = both
		} else {
			*out = io.MultiWriter(*out, both)
		}
	}
	return cmd
}

// shared is a writer that several may use at a time.
type shared struct {
	mu sync.Mutex
	to io.Writer
}

func (s *shared) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = s.to.Write(p)
	return len(p), nil
}
