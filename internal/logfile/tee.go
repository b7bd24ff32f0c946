package logfile

import "io"

// Tee passes on to Live, if there is one, what it writes.
type Tee struct {
	*Writer
	Live io.Writer
}

func (t Tee) Write(p []byte) (int, error) {
	if t.Live != nil {
		_, _ = t.Live.Write(p)
	}
	return t.Writer.Write(p)
}
