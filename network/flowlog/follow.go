package flowlog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Config says whose packets Follow gets.
type Config struct {
	// Dir has the sockets of those who follow guests of a network, each under its guest's MAC. It is
	// made if what it is in is there.
	Dir   string
	Table string // the network's
	MAC   string // the guest's, as net.HardwareAddr has it
	Event func(Event)
	Log   *slog.Logger
}

// retry is how long another waits at most to take the place of a process that listened and was
// killed.
const retry = 5 * time.Second

// maxDatagram bounds what is passed on at once, in bytes.
const maxDatagram = 64 << 10

// Follow calls Event with what a guest of the calling thread's network begins, until ctx ends.
// Returns ErrNotSupported.
func Follow(ctx context.Context, c Config) error {
	if err := os.Mkdir(c.Dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("follow guest %s: %w", c.MAC, err)
	}
	dir, err := os.Open(c.Dir)
	if err != nil {
		return fmt.Errorf("follow guest %s: %w", c.MAC, err)
	}
	defer dir.Close()
	f := &follower{Config: c, dir: dir, free: make(chan struct{}, 1)}
	path := filepath.Join(c.Dir, c.MAC)
	// One that is there is that of a process that was killed.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("follow guest %s: %w", c.MAC, err)
	}
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: f.at(c.MAC)})
	if err != nil {
		return fmt.Errorf("follow guest %s: %w", c.MAC, err)
	}
	made, err := os.Lstat(path)
	if err != nil {
		return errors.Join(fmt.Errorf("follow guest %s: %w", c.MAC, err), socket.Close())
	}
	defer func() {
		// The guest's next run may have its own by now. If it stays, it goes with the network.
		if is, err := os.Lstat(path); err == nil && os.SameFile(is, made) {
			_ = os.Remove(path)
		}
	}()
	var work sync.WaitGroup
	defer work.Wait()
	defer socket.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = socket.Close() })()
	work.Go(func() {
		defer cancel()
		f.hear(socket)
	})
	for ctx.Err() == nil {
		err := f.listen(ctx)
		if errors.Is(err, ErrNotSupported) {
			return err
		}
		level := slog.LevelWarn
		if errors.Is(err, errTaken) {
			level = slog.LevelDebug
		}
		if ctx.Err() == nil {
			f.Log.Log(ctx, level, "listen to rules", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-f.free:
		case <-time.After(retry):
		}
	}
	return nil
}

type follower struct {
	Config
	dir  *os.File
	free chan struct{} // nobody may listen
}

// at is where the socket of a guest is, however long the path of the directory.
func (f *follower) at(mac string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", f.dir.Fd(), mac) }

// hear takes what is passed on. Nothing means that nobody listens any more.
func (f *follower) hear(socket *net.UnixConn) {
	buf := make([]byte, maxDatagram)
	for {
		n, err := socket.Read(buf)
		if err != nil {
			return
		}
		if n == 0 {
			select {
			case f.free <- struct{}{}:
			default:
			}
		}
		for line := range bytes.Lines(buf[:n]) {
			if e, ok := parse(line); ok {
				f.Event(e)
			}
		}
	}
}

// listen passes on what the kernel tells. Returns errTaken where another does.
func (f *follower) listen(ctx context.Context) error {
	l, err := listen(Group(f.Table))
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	out, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return errors.Join(fmt.Errorf("pass on what rules log: %w", err), l.Close())
	}
	defer unix.Close(out)
	// A socket that is full, or of nobody, keeps nobody: its guest's log lacks something then.
	send := func(mac string, data []byte) {
		if err := unix.Sendto(out, data, unix.MSG_DONTWAIT, &unix.SockaddrUnix{Name: f.at(mac)}); err != nil {
			f.Log.Debug("pass on what rules log", "guest", mac, "err", err)
		}
	}
	for {
		all, err := l.receive()
		if err != nil {
			_ = l.Close() // before another tries
			others, _ := os.ReadDir(f.Dir)
			for _, o := range others {
				if o.Name() != f.MAC {
					send(o.Name(), nil)
				}
			}
			return err
		}
		for mac, events := range all {
			send(mac, encode(events))
		}
	}
}

// encode makes lines of events, as many as fit.
func encode(events []Event) (data []byte) {
	for _, e := range events {
		line, err := json.Marshal(e)
		if err != nil || len(data)+len(line) >= maxDatagram {
			continue
		}
		data = append(append(data, line...), '\n')
	}
	return data
}
