package agent_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
)

// A program that its caller leaves to itself goes on, and gets no hang-up.
func TestExec_Detach(t *testing.T) {
	_, c := newServer(t, nil)
	for _, tty := range []bool{false, true} {
		dir := t.TempDir()
		detach := make(chan struct{})
		typed, keys := io.Pipe()
		var out bytes.Buffer
		came := make(chan struct{})
		err := error(nil)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, err = c.Exec(t.Context(), guest.Cmd{
				Args: sh("trap 'echo hang-up >said; exit' HUP; read x; echo got $x; : >begun; while [ ! -e go ] && " + tested +
					"; do sleep 0.01; done; echo more; echo on >said"), Dir: dir,
				TTY: tty, Stdin: typed, Detach: detach, Stdout: writerFunc(func(p []byte) (int, error) {
					before := strings.Contains(out.String(), "got it")
					n, err := out.Write(p)
					if !before && strings.Contains(out.String(), "got it") {
						close(came)
					}
					return n, err
				}),
			})
		}()
		if _, err := io.WriteString(keys, "it\n"); err != nil {
			t.Fatal(err)
		}
		await(t, dir+"/begun")
		<-came
		close(detach)
		<-done
		if !errors.Is(err, agent.ErrDetached) {
			t.Errorf("got %v", err)
		}
		if err := os.WriteFile(dir+"/go", nil, 0o600); err != nil {
			t.Fatal(err)
		}
		await(t, dir+"/said")
		for end := time.Now().Add(10 * time.Second); ; {
			if said, err := os.ReadFile(dir + "/said"); err != nil || string(said) == "on\n" {
				break
			} else if time.Now().After(end) {
				t.Fatalf("it said %q", said)
			}
		}
		_ = keys.Close()
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// await waits for a file.
func await(t *testing.T, name string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(name); err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s did not come", name)
		}
	}
}
