package vmm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/status"
)

// inputSize is how much of what was typed waits in the FIFO for the guest to read it: the least
// that there is. The VMM takes no more than the serial port's own 64 bytes until the guest has read
// those.
const inputSize = 4 << 10

// makeInput makes the FIFO that is the VMM's standard input, and opens it for the VMM: to write
// too, so that it has no end when no process writes.
func (p *Process) makeInput() (*os.File, error) {
	path := filepath.Join(p.Dir, store.InputFIFO)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, fmt.Errorf("make FIFO %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	_, _ = unix.FcntlInt(f.Fd(), unix.F_SETPIPE_SZ, inputSize) // else more waits
	return f, nil
}

// input is the serial port's input of a VMM that runs.
type input struct{ f *os.File }

// OpenInput opens the serial port's input of the VMM of a run in dir. Returns ErrState where that
// has none: it has ended, or was started by an older smartvm.
func OpenInput(dir string) (io.WriteCloser, error) {
	f, err := os.OpenFile(filepath.Join(dir, store.InputFIFO), os.O_WRONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("open console input: %w: the VM was started without: stop and start it", status.ErrState)
	case errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("open console input: %w: %w", status.ErrState, errEnded)
	case err != nil:
		return nil, fmt.Errorf("open console input: %w", err)
	}
	return &input{f}, nil
}

// inputPatience is how long a guest may take to read anything when there is no room for more.
const inputPatience = 5 * time.Second

// inputPart is how many bytes are written at once: all or none of so few (PIPE_BUF).
const inputPart = 512

// Write returns when all is in the FIFO, ErrUnread when the guest does not read.
func (i *input) Write(p []byte) (n int, err error) {
	for n < len(p) {
		if err := i.f.SetWriteDeadline(time.Now().Add(inputPatience)); err != nil {
			return n, fmt.Errorf("write to console: %w", err)
		}
		more, err := i.f.Write(p[n:min(n+inputPart, len(p))])
		n += more
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return n, fmt.Errorf("write to console: %w", status.ErrUnread)
		case errors.Is(err, unix.EPIPE):
			return n, fmt.Errorf("write to console: %w: %w", status.ErrState, errEnded)
		case err != nil:
			return n, fmt.Errorf("write to console: %w", err)
		}
	}
	return n, nil
}

func (i *input) Close() error { return i.f.Close() }
