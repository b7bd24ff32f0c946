package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/sockpath"
)

// A socket that is not there yet is tried this often. A notification descriptor would cost more to close than Firecracker
// takes to listen. Where it takes longer than that, it waits for a processor, which nobody gets who looks all the time.
const (
	connectPoll    = 50 * time.Microsecond
	connectPart    = 8 // or after that part of the time that it has taken, if that is longer
	maxConnectPoll = 10 * time.Millisecond
)

// Dial connects to the socket name in the VMM's working directory, which it waits for. An end of the VMM
// meanwhile is an error at once. Connect to a VMM of another process with DialSocket.
func (p *Process) Dial(ctx context.Context, name string) (net.Conn, error) {
	root := p.cfg.Root()
	path := filepath.Join(root, name)
	for begun := time.Now(); ; {
		// A look costs a tenth of a connection that fails.
		err := unix.Access(path, unix.F_OK)
		var c net.Conn
		if err == nil {
			c, err = DialSocket(ctx, root, name)
		}
		if err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) {
			return c, err
		}
		select {
		case <-p.done:
			return nil, fmt.Errorf("connect to VMM: %w: %s", errEnded, p.exit)
		case <-ctx.Done():
			return nil, fmt.Errorf("connect to VMM: %w: %w", context.Cause(ctx), err)
		default:
		}
		// Not a timer of Go's: when nothing else runs, those wake a millisecond late, and the VMM needs just that.
		pause := min(max(connectPoll, time.Since(begun)/connectPart), maxConnectPoll)
		_ = unix.Nanosleep(&unix.Timespec{Nsec: pause.Nanoseconds()}, nil)
	}
}

// DialSocket connects to the Unix socket dir/name, however long that path is.
func DialSocket(ctx context.Context, dir, name string) (net.Conn, error) {
	path, done, err := sockpath.At(dir, name)
	if err != nil {
		return nil, fmt.Errorf("connect to VMM: %w", err)
	}
	defer done()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to VMM: %w", err)
	}
	return c, nil
}
