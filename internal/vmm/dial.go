package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A socket that is not there yet is tried this often. A notification descriptor would cost more to
// close than Firecracker takes to listen. Where it takes longer than that, it waits for a
// processor, which nobody gets who looks all the time.
const (
	connectPoll    = 50 * time.Microsecond
	connectPart    = 8 // or after that part of the time that it has taken, if that is longer
	maxConnectPoll = 10 * time.Millisecond
)

// Dial connects to the socket name in the VMM's working directory, which it waits for. An end of
// the VMM meanwhile is an error at once. Connect to a VMM of another process with DialSocket.
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
		// Not a timer of Go's: when nothing else runs, those wake a millisecond late, and the VMM needs
		// just that.
		pause := min(max(connectPoll, time.Since(begun)/connectPart), maxConnectPoll)
		_ = unix.Nanosleep(&unix.Timespec{Nsec: pause.Nanoseconds()}, nil)
	}
}

// DialSocket connects to the Unix socket dir/name, however long that path is. The directory may be
// the VMM's own, so a link there, which could lead to a socket of the host, is not followed.
func DialSocket(ctx context.Context, dir, name string) (net.Conn, error) {
	c, err := dialSocket(ctx, filepath.Join(dir, name))
	if err != nil {
		return nil, fmt.Errorf("connect to VMM: %w", err)
	}
	return c, nil
}

func dialSocket(ctx context.Context, path string) (net.Conn, error) {
	// The socket is connected to by a descriptor of it: nothing can be put in its place after it was
	// looked at.
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, fmt.Errorf("%w: %s is no socket", fs.ErrInvalid, path)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}
