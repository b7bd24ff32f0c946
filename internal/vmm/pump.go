package vmm

import (
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// pump passes on what comes out of a FIFO.
type pump struct {
	path string
	f    *os.File
	to   io.WriteCloser
	lost func(path string, err error) // see Streams
}

// pumpBuffer is all that a stream costs in memory.
const pumpBuffer = 4 << 10

// openPump opens the FIFO at path for reading. The directory may be the VMM's own, so what is there
// is checked.
func openPump(path string, to io.WriteCloser, lost func(string, error)) (*pump, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open FIFO: %w", err)
	}
	if fi, err := f.Stat(); err != nil || fi.Mode()&fs.ModeNamedPipe == 0 {
		f.Close()
		return nil, fmt.Errorf("open FIFO: %s is not one", path)
	}
	return &pump{path: path, f: f, to: to, lost: lost}, nil
}

// run returns at the stream's end, or at the read deadline. What cannot be passed on is dropped:
// the stream must not stop because a disk is full.
func (p *pump) run() {
	defer p.close()
	buf := make([]byte, pumpBuffer)
	for {
		n, err := p.f.Read(buf)
		if n > 0 {
			if _, err := p.to.Write(buf[:n]); err != nil && p.lost != nil {
				p.lost(p.path, err)
				p.lost = nil
			}
		}
		if err != nil {
			return
		}
	}
}

func (p *pump) close() {
	_ = p.f.Close()
	_ = p.to.Close()
}
