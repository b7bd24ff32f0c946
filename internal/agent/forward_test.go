package agent_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"

	"push.rocks/smartvm/internal/agent"
)

func TestForward(t *testing.T) {
	var config net.ListenConfig
	l, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended, failures := make(chan error, 1), make(chan error, 1)
	works := make(chan bool, 2)
	go func() {
		ended <- agent.Forward(ctx, l, func(context.Context) (net.Conn, error) {
			if !<-works {
				return nil, errors.New("nobody there")
			}
			a, b := net.Pipe()
			go func() { _, _ = io.Copy(b, b) }()
			return a, nil
		}, func(err error) { failures <- err })
	}()
	dial := func() net.Conn {
		var d net.Dialer
		c, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	works <- false
	if _, err := dial().Read(make([]byte, 1)); !errors.Is(err, io.EOF) || (<-failures).Error() != "nobody there" {
		t.Errorf("got %v", err)
	}
	works <- true
	c := dial()
	if _, err := io.WriteString(c, "echo"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "echo" {
		t.Errorf("got %q, %v", got, err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	if _, err := c.Read(got); err == nil {
		t.Error("the connection is still there")
	}
}
