package agent_test

import (
	"bytes"
	"errors"
	"maps"
	"strings"
	"testing"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
)

// Secrets are told once; programs have the environment among them, under what they are given
// themselves.
func TestTell(t *testing.T) {
	s, c := newServer(t, &guest.Boot{Env: []string{"A=image"}, Secrets: true})
	kept := map[string][]byte{}
	fail := errors.New("no room")
	s.Secrets = func(files map[string][]byte) error {
		if fail != nil {
			return fail
		}
		for name, data := range files {
			kept[name] = data
		}
		return nil
	}
	files, large := map[string][]byte{"key": []byte("\x00\xff"), "large": make([]byte, 2<<20)},
		"B="+strings.Repeat("x", 100<<10)
	err := c.Tell(t.Context(), files, []string{"A=told"})
	if _, ok := errors.AsType[*agent.GuestError](err); !ok || !strings.Contains(err.Error(), "no room") {
		t.Errorf("got %v", err)
	}
	select {
	case <-s.Told():
		t.Error("what was not stored counts as told")
	default:
	}
	fail = nil
	if err := c.Tell(t.Context(), files, []string{"A=told", large}); err != nil {
		t.Fatal(err)
	}
	<-s.Told()
	if !maps.EqualFunc(files, kept, bytes.Equal) { // cmp.Diff takes a minute for MiB under the race detector
		t.Errorf("kept %d secrets that are not the %d told", len(kept), len(files))
	}
	if err := c.Tell(t.Context(), map[string][]byte{"key": []byte("again")}, []string{"A=again"}); err != nil ||
		len(kept["key"]) != 2 {
		t.Errorf("told again: %v, %q", err, kept["key"])
	}
	if _, out, _ := run(t, c,
		guest.Cmd{Args: sh("echo $A ${#B} $C"), Env: []string{"C=mine"}}); out != "told 102400 mine\n" {
		t.Errorf("got %q", out)
	}
	if err := c.Tell(t.Context(), map[string][]byte{"key": make([]byte, 4<<20)}, nil); err == nil {
		t.Error("more than a frame is told")
	}
}
