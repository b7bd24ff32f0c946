package control_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"push.rocks/smartvm/internal/control"
	"push.rocks/smartvm/internal/testenv"
)

// Who asks is told what came of it, in a directory with a short path and in one whose sockets have
// none that fits; a socket that was left is no hindrance.
func TestAsk(t *testing.T) {
	for name, dir := range map[string]string{"Short": "d", "Long": strings.Repeat("long", 40)} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), dir)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := control.Ask(t.Context(), dir, "c.sock"); !errors.Is(err, control.ErrNobody) {
				t.Errorf("nobody listens: %v", err)
			}
			for range 2 { // the second finds the first one's socket
				ctx, stop := context.WithCancel(t.Context())
				answers := []error{nil, errors.New("port 80 is taken"), nil}
				calls := 0
				var work sync.WaitGroup
				work.Go(func() {
					err := control.Listen(ctx, dir, "c.sock", func() error {
						calls++
						return answers[calls-1]
					})
					if err != nil {
						t.Error(err)
					}
				})
				for i, want := range answers {
					var err error
					for deadline := time.Now().Add(testenv.Patience(5 * time.Second)); ; {
						if err = control.Ask(t.Context(), dir, "c.sock"); !errors.Is(err, control.ErrNobody) ||
							time.Now().After(deadline) {
							break
						}
					}
					if (err == nil) != (want == nil) || err != nil && err.Error() != want.Error() {
						t.Errorf("%d: got %v, want %v", i, err, want)
					}
				}
				stop()
				work.Wait()
				if err := control.Ask(t.Context(), dir, "c.sock"); !errors.Is(err, control.ErrNobody) {
					t.Errorf("after the end: %v", err)
				}
				// One that died leaves its socket.
				l, err := net.ListenUnix("unix", &net.UnixAddr{Name: testenv.Socket(t, filepath.Join(dir, "c.sock")), Net: "unix"})
				if err != nil {
					t.Fatal(err)
				}
				l.SetUnlinkOnClose(false)
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// Who does not answer is not waited for without end.
func TestAsk_Hung(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", testenv.Socket(t, filepath.Join(dir, "c.sock")))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := control.Ask(ctx, dir, "c.sock"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
