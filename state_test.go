package smartvm_test

import (
	"errors"
	"slices"
	"testing"

	"push.rocks/smartvm"
)

func TestTransitions(t *testing.T) {
	all := []smartvm.State{
		smartvm.Creating, smartvm.Stopped, smartvm.Starting, smartvm.Running, smartvm.Paused, smartvm.Stopping,
		smartvm.Removing, smartvm.Failed, smartvm.Lost,
	}
	for _, tt := range []struct {
		op, call string
		allowed  []smartvm.State
		want     string          // of the error's text
		noClient []smartvm.State // where the error's code is NO_CLIENT, INVALID_STATE elsewhere
	}{
		{"start", "start", []smartvm.State{smartvm.Stopped, smartvm.Failed, smartvm.Lost}, "stopped or failed or lost", nil},
		{
			"pause", "pause",
			[]smartvm.State{smartvm.Running},
			"running",
			[]smartvm.State{smartvm.Stopped, smartvm.Failed, smartvm.Lost},
		},
		{"resume", "resume", []smartvm.State{smartvm.Paused}, "paused", nil},
		{
			"stop", "stop", []smartvm.State{
				smartvm.Stopped, smartvm.Starting, smartvm.Running, smartvm.Paused, smartvm.Stopping, smartvm.Failed, smartvm.Lost,
			}, "stopped or starting or running or paused or stopping or failed or lost", nil,
		},
		{
			"remove", "remove",
			[]smartvm.State{smartvm.Stopped, smartvm.Failed, smartvm.Lost},
			"stopped or failed or lost", nil,
		},
		{
			"call", "update drive",
			[]smartvm.State{smartvm.Running, smartvm.Paused},
			"running or paused",
			[]smartvm.State{smartvm.Stopped, smartvm.Failed, smartvm.Lost},
		},
	} {
		for _, state := range all {
			err := smartvm.Allow("vm-1", tt.op, tt.call, state)
			if slices.Contains(tt.allowed, state) {
				if err != nil {
					t.Errorf("%s of what is %s: %v", tt.op, state, err)
				}
				continue
			}
			var se *smartvm.StateError
			if !errors.Is(err, smartvm.ErrState) || !errors.As(err, &se) {
				t.Errorf("%s of what is %s: %v, want ErrState", tt.op, state, err)
				continue
			}
			if se.ID != "vm-1" || se.Op != tt.call || se.State != state || !slices.Equal(se.Want, tt.allowed) {
				t.Errorf("%s of what is %s: %+v", tt.op, state, se)
			}
			if want := tt.call + " VM vm-1: it is " + string(state) + ", not " + tt.want; err.Error() != want {
				t.Errorf("error is %q, want %q", err, want)
			}
			code := "INVALID_STATE"
			if slices.Contains(tt.noClient, state) {
				code = "NO_CLIENT"
			}
			if got := smartvm.Code(err); got != code {
				t.Errorf("%s of what is %s: code %s, want %s", tt.op, state, got, code)
			}
		}
	}
	if ops := smartvm.Operations(); !slices.Equal(ops, []string{"call", "pause", "remove", "resume", "start", "stop"}) {
		t.Errorf("operations %q are not those of this test", ops)
	}
}
