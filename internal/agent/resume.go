package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/agentproto"
)

// Making a snapshot of a VM ends its guest's connections. A program in the guest waits for its host
// then, see [agentproto.OpResume].

const (
	// resumePatience bounds how long a VM that answers may have nobody who does so in its guest.
	resumePatience = 5 * time.Second
	// resumePause is that between two tries, so that a guest that answers and hangs up has nobody
	// busy.
	resumePause = 20 * time.Millisecond
	// detachPatience bounds how long the guest may take to hear that it is left to itself.
	detachPatience = 5 * time.Second
)

// newToken is what a session is known by.
func newToken() []byte {
	token := make([]byte, agentproto.TokenSize)
	_, _ = rand.Read(token) // never fails
	return token
}

// again returns how conn, whose session token is, goes on when it was lost: the error is why it
// cannot. While the VM is paused that is tried as long as it exists, or ctx.
func (c *Client) again(ctx context.Context, conn *agentproto.Conn, token []byte) func(error) (agentproto.Link, error) {
	tried := false
	return func(lost error) (agentproto.Link, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() {
			select {
			case <-conn.Done():
				cancel()
			case <-ctx.Done():
			}
		}()
		req := agentproto.Request{Op: agentproto.OpResume, Token: token, Received: conn.Received()}
		for end := time.Now().Add(resumePatience); ; {
			if tried {
				select {
				case <-ctx.Done():
				case <-time.After(resumePause):
				}
			}
			tried = true
			link, err := c.resume(ctx, req)
			if err == nil {
				return link, nil
			}
			// it stands still, and so many wait for it already
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, syscall.EAGAIN) {
				end = time.Now().Add(resumePatience)
			}
			if ctx.Err() != nil || !errors.Is(err, ErrNoAgent) && !errors.Is(err, ErrLost) && !errors.Is(err, syscall.EAGAIN) ||
				time.Now().After(end) {
				return agentproto.Link{}, fmt.Errorf("%w; to go on: %v", lost, err) //nolint:errorlint // what it ended with counts
			}
		}
	}
}

func (c *Client) resume(ctx context.Context, req agentproto.Request) (agentproto.Link, error) {
	conn, err := c.open(ctx, req)
	if err != nil {
		return agentproto.Link{}, err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	r, err := answer(conn)
	if err != nil {
		return agentproto.Link{}, errors.Join(err, conn.Close())
	}
	return agentproto.Link{Conn: conn, Received: r.Received}, nil
}
