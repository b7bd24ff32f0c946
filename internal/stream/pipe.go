package stream

import (
	"context"
	"io"
)

const (
	blockSize   = 256 << 10
	blocksAhead = 4
)

// Pipe carries bytes from one goroutine to another in large blocks, so that both have work. One
// writes and calls Finish, one reads and calls Stop. The context's end ends both.
type Pipe struct {
	ctx  context.Context
	full chan []byte
	free chan []byte
	gone chan struct{} // closed by Stop
	in   []byte        // the writer's, filling
	out  []byte        // the reader's, what is left of block
	last []byte
	werr error // the writer's end; set before full is closed
	rerr error // the reader's; set before gone is closed
}

// NewPipe makes a pipe that ends with its context.
func NewPipe(ctx context.Context) *Pipe {
	p := &Pipe{
		ctx: ctx, full: make(chan []byte, blocksAhead), free: make(chan []byte, blocksAhead),
		gone: make(chan struct{}),
	}
	for range blocksAhead {
		p.free <- make([]byte, 0, blockSize)
	}
	return p
}

func (p *Pipe) Write(b []byte) (n int, err error) {
	for n < len(b) {
		if p.in == nil {
			select {
			case p.in = <-p.free:
			case <-p.gone:
				return n, p.rerr
			case <-p.ctx.Done():
				return n, context.Cause(p.ctx)
			}
		}
		m := copy(p.in[len(p.in):cap(p.in)], b[n:])
		p.in, n = p.in[:len(p.in)+m], n+m
		if len(p.in) == cap(p.in) {
			p.full <- p.in // it has room for every block
			p.in = nil
		}
	}
	return n, nil
}

// Finish ends the writing: the reader gets what is left, then err or io.EOF.
func (p *Pipe) Finish(err error) {
	if len(p.in) > 0 {
		p.full <- p.in
		p.in = nil
	}
	p.werr = err
	close(p.full)
}

func (p *Pipe) Read(b []byte) (int, error) {
	if len(p.out) == 0 {
		if p.last != nil {
			p.free <- p.last[:0] // it has room for every block
			p.last = nil
		}
		select {
		case block, ok := <-p.full:
			if !ok {
				if p.werr != nil {
					return 0, p.werr
				}
				return 0, io.EOF
			}
			p.last, p.out = block, block
		case <-p.ctx.Done():
			return 0, context.Cause(p.ctx)
		}
	}
	n := copy(b, p.out)
	p.out = p.out[n:]
	return n, nil
}

// Stop ends the reading: the writer gets err.
func (p *Pipe) Stop(err error) {
	p.rerr = err
	close(p.gone)
}
