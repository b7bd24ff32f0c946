package smartvm_test

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/testenv"
)

// fakeAgent plays a guest's agent behind the socket that a fake VMM does not make: it answers each
// request by reply, or if that is nil, never. After an answer, when the host has gone, it calls
// agreed.
func fakeAgent(t *testing.T, path string, reply func(agentproto.Request) agentproto.Reply, agreed func()) {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", testenv.Socket(t, path))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	answer := func(raw net.Conn) {
		defer raw.Close()
		for b := []byte{0}; b[0] != '\n'; { // CONNECT and a port
			if _, err := raw.Read(b); err != nil {
				return
			}
		}
		if reply == nil {
			_, _ = io.Copy(io.Discard, raw)
			return
		}
		_, _ = io.WriteString(raw, "OK 1073741824\n")
		conn := agentproto.NewConn(raw)
		_, payload, err := conn.Receive()
		if err != nil {
			return
		}
		var req agentproto.Request
		if err := json.Unmarshal(payload, &req); err != nil {
			t.Error(err)
			return
		}
		_ = conn.SendJSON(agentproto.KindReply, reply(req))
		_, _, _ = conn.Receive()
		if req.Op == agentproto.OpStop {
			agreed()
		}
	}
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go answer(raw)
		}
	}()
}

func TestFault_StopByAgent(t *testing.T) {
	agrees := func(agentproto.Request) agentproto.Reply { return agentproto.Reply{Version: agentproto.Version} }
	older := func(req agentproto.Request) agentproto.Reply {
		return agentproto.Reply{
			Version: agentproto.Version, Error: "the agent does not know how to \"" + string(req.Op) + "\"",
		}
	}
	for name, tt := range map[string]struct {
		reply   func(agentproto.Request) agentproto.Reply
		ends    bool
		timeout time.Duration
		how     string
		outcome smartvm.Outcome
	}{
		"obeyed":         {agrees, true, time.Hour, smartvm.AgentStop, smartvm.OutcomeExited},
		"only agreed":    {agrees, false, 2 * time.Second, smartvm.Killed, smartvm.OutcomeKilled}, // it gets no more time
		"older agent":    {older, false, time.Hour, smartvm.CtrlAltDel, smartvm.OutcomeExited},
		"never answered": {nil, false, 8 * time.Second, smartvm.CtrlAltDel, smartvm.OutcomeExited},
	} {
		t.Run(name, func(t *testing.T) {
			ends := fakefc.Fault{Exit: &fakefc.Exit{}, After: true}
			faults := map[string]fakefc.Fault{"SendCtrlAltDel": ends, "FlushMetrics": ends}
			site := newFaultSite(t, fakefc.Script{Faults: faults})
			site.spec.Vsock = &smartvm.Vsock{GuestCID: 3}
			m, err := site.open(t).Create(t.Context(), site.spec)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := m.Pause(t.Context()); err != nil { // it is resumed for the question
				t.Fatal(err)
			}
			i, err := m.Inspect(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			fakeAgent(t, i.Vsock, tt.reply, func() {
				if tt.ends {
					_ = m.FlushMetrics(context.Background())
				}
			})
			how, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: tt.timeout})
			if err != nil || how != tt.how {
				t.Errorf("stopped by %q: %v, want %q", how, err, tt.how)
			}
			if exit, err := m.Exit(); err != nil || exit.Outcome != tt.outcome {
				t.Errorf("exit %+v: %v, want %s", exit, err, tt.outcome)
			}
		})
	}
}
