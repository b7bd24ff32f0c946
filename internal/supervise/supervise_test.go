package supervise_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/internal/supervise"
	"push.rocks/smartvm/internal/testenv"
)

func TestConfig_ArgsParse(t *testing.T) {
	for _, want := range []*supervise.Config{
		{RuntimeDir: "/run/vm", ID: "a-1"},
		{RuntimeDir: "/run/vm", DataDir: "/srv/vm", Firewall: "/etc/vm.json", ID: "-odd", Adopt: true, Verbose: true},
	} {
		args := want.Args()
		if args[0] != supervise.Verb {
			t.Errorf("got %q first", args[0])
		}
		got, err := supervise.Parse(args[1:])
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(supervise.Config{})); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	}
	for _, bad := range [][]string{{}, {"a", "b"}, {"--frobnicate", "a"}} {
		if _, err := supervise.Parse(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

// program writes a shell script in place of a supervisor.
func program(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// await fails the test if something does not come about.
func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.After(testenv.Patience(10 * time.Second))
	for tick := time.Tick(time.Millisecond); !is(); {
		select {
		case <-tick:
		case <-deadline:
			t.Errorf("%s does not come", what)
			return
		}
	}
}

func TestConfig_Spawn(t *testing.T) {
	c := supervise.Config{RuntimeDir: t.TempDir(), ID: "a-1"}
	for name, tt := range map[string]struct{ script, want string }{
		"well":        {`echo '{}' >&3`, ""},
		"failure":     {`echo '{"error":{"message":"no kernel","code":"FAILED"}}' >&3`, "no kernel"},
		"dies":        {`exit 3`, "its supervisor ended: exit status 3"},
		"is killed":   {`kill -9 $$`, "its supervisor ended: signal: killed"},
		"stops short": {`printf '{"err' >&3`, "its supervisor ended: exit status 0"},
		"says garbage": {
			`echo garbage >&3; while kill -0 $PPID; do sleep 0.01; done`,
			"its supervisor ended: invalid character",
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.Spawn(t.Context(), program(t, tt.script))
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	t.Run("context ends", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		cause := errors.New("enough")
		path := program(t, "trap 'exit 1' TERM\n: >\"$0.ready\"\nwhile kill -0 $PPID; do sleep 0.01; done")
		ready := path + ".ready"
		go func() {
			for ctx.Err() == nil {
				if _, err := os.Stat(ready); err == nil {
					cancel(cause)
				}
			}
		}()
		if err := c.Spawn(ctx, path); !errors.Is(err, cause) {
			t.Errorf("got %v, want %v", err, cause)
		}
	})
	// A start that succeeds as its context ends is given up, too: the process has been told so.
	t.Run("context ends with the start", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		cause := errors.New("enough")
		path := program(t, "trap 'echo \"{}\" >&3; exit 0' TERM\n: >\"$0.ready\"\nwhile kill -0 $PPID; do sleep 0.01; done")
		go func() {
			await(t, "the process", func() bool { _, err := os.Stat(path + ".ready"); return err == nil })
			cancel(cause)
		}()
		if err := c.Spawn(ctx, path); !errors.Is(err, cause) {
			t.Errorf("got %v, want %v", err, cause)
		}
	})
	t.Run("no zombie", func(t *testing.T) {
		path := program(t, "echo $$ >\"$0.pid\"; echo '{}' >&3")
		if err := c.Spawn(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		pid, err := os.ReadFile(path + ".pid")
		if err != nil {
			t.Fatal(err)
		}
		await(t, "its end", func() bool {
			_, err := os.Stat("/proc/" + strings.TrimSpace(string(pid)))
			return errors.Is(err, os.ErrNotExist)
		})
	})
	t.Run("no program", func(t *testing.T) {
		if err := c.Spawn(t.Context(), "/nonexistent"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
}

func TestDescribe(t *testing.T) {
	field := &smartvm.FieldError{Path: "drives[0].pathOnHost", Value: "x", Reason: "is not there"}
	for name, tt := range map[string]struct {
		err  error
		want supervise.Failure
	}{
		"fields": {
			fmt.Errorf("create: %w", errors.Join(field, errors.New("more"))),
			supervise.Failure{
				Message: "create: drives[0].pathOnHost: is not there (got \"x\")\nmore", Code: "INVALID_SPEC",
				Fields: []supervise.Field{{Path: "drives[0].pathOnHost", Reason: "is not there"}},
			},
		},
		"sentinel": {
			fmt.Errorf("a: %w", smartvm.ErrExists),
			supervise.Failure{Message: "a: already exists", Code: "ALREADY_EXISTS"},
		},
		"no client": {
			&smartvm.StateError{
				ID: "a", Op: "pause", State: smartvm.Stopped,
				Want: []smartvm.State{smartvm.Running},
			},
			supervise.Failure{Message: "pause VM a: it is stopped, not running", Code: "NO_CLIENT"},
		},
		"cancelled": {context.Canceled, supervise.Failure{Message: "context canceled", Code: "INTERRUPTED"}},
		"not found": {
			fmt.Errorf("a: %w", smartvm.ErrNotFound),
			supervise.Failure{Message: "a: not found", Code: "NOT_FOUND"},
		},
		"state": {
			fmt.Errorf("a: %w", smartvm.ErrState),
			supervise.Failure{Message: "a: wrong state", Code: "INVALID_STATE"},
		},
		"too old": {
			fmt.Errorf("a: %w", smartvm.ErrNotSupported),
			supervise.Failure{Message: "a: not supported", Code: "NOT_SUPPORTED"},
		},
		"offline": {
			fmt.Errorf("a: %w", image.ErrOffline),
			supervise.Failure{Message: "a: " + image.ErrOffline.Error(), Code: "OFFLINE"},
		},
		"unknown": {errors.New("x"), supervise.Failure{Message: "x", Code: "FAILED"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := supervise.Describe(tt.err)
			if diff := cmp.Diff(&tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			// It stays the same on its way through another process.
			data, err := json.Marshal(got)
			if err != nil {
				t.Fatal(err)
			}
			var back supervise.Failure
			if err := json.Unmarshal(data, &back); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(got, supervise.Describe(&back)); diff != "" {
				t.Errorf("-sent +received:\n%s", diff)
			}
			for _, sentinel := range []error{
				smartvm.ErrNotFound, smartvm.ErrExists, smartvm.ErrState, smartvm.ErrNotSupported, context.Canceled,
				image.ErrOffline,
			} {
				if want, got := errors.Is(tt.err, sentinel), errors.Is(fmt.Errorf("start: %w", &back), sentinel); got != want {
					t.Errorf("it is %q there: %v, want %v", sentinel, got, want)
				}
			}
		})
	}
}
