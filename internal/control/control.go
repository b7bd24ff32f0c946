// Package control lets a process ask the one that supervises a VM to take over what has changed in
// the VM's record.
package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/sockpath"
)

// ErrNobody means that no process listens.
var ErrNobody = errors.New("no process supervises the VM")

const (
	// maxAnswer bounds what is read of an answer, in bytes.
	maxAnswer = 16 << 10
	// askTimeout bounds the wait for an answer: published ports may have to be looked for.
	askTimeout = 30 * time.Second
)

// Listen calls changed for each process that asks, one after the other, and tells it the error,
// until ctx ends. It takes the place of a socket that a process has left which died: the caller
// must hold the VM's lock.
func Listen(ctx context.Context, dir, name string, changed func() error) error {
	at, done, err := sockpath.At(dir, name)
	if err != nil {
		return fmt.Errorf("listen for changes: %w", err)
	}
	defer done()
	if err := os.Remove(at); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("listen for changes: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", at)
	if err != nil {
		return fmt.Errorf("listen for changes: %w", err)
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("listen for changes: %w", err)
		}
		text := ""
		if err := changed(); err != nil {
			text = err.Error()
		}
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		_, _ = io.WriteString(conn, text) // who has gone meanwhile does not want to know
		_ = conn.Close()
	}
}

// Ask asks whoever listens, and returns the error that it tells. Returns ErrNobody.
func Ask(ctx context.Context, dir, name string) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	at, done, err := sockpath.At(dir, name)
	if errors.Is(err, os.ErrNotExist) {
		return ErrNobody
	}
	if err != nil {
		return fmt.Errorf("tell what has changed: %w", err)
	}
	defer done()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", at)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return ErrNobody
	}
	if err != nil {
		return fmt.Errorf("tell what has changed: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	text, err := io.ReadAll(io.LimitReader(conn, maxAnswer))
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("tell what has changed: %w", context.Cause(ctx))
	case err != nil:
		return fmt.Errorf("tell what has changed: %w", err)
	case len(text) > 0:
		return errors.New(string(text))
	}
	return nil
}
