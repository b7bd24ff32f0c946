package agent

import (
	"io"
	"sync"
)

// Tee is cmd with all that it puts out written to w too. What goes wrong with that is nobody's concern who wants to see it.
func (cmd Cmd) Tee(w io.Writer) Cmd {
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
