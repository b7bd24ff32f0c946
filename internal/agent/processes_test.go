package agent_test

import (
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"push.rocks/smartvm/guest"
)

func TestProcesses(t *testing.T) {
	_, c := newServer(t, nil)
	cmd := exec.CommandContext(t.Context(), "/bin/bash")
	cmd.Args = []string{"odd (name)\n\x1b[2J", "-c", "read x"}
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	for end := time.Now().Add(10 * time.Second); ; {
		all, err := c.Processes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(p guest.Process) bool { return p.PID == cmd.Process.Pid })
		// it has both a moment after its name
		if i >= 0 && all[i].Command == "odd (name)??[2J -c read x" && all[i].Memory > 0 {
			if p := all[i]; p.Parent != os.Getpid() || p.State == "" || p.User == "" {
				t.Errorf("%+v", p)
			}
			break
		}
		if time.Now().After(end) {
			t.Fatalf("process %d is not among %d, or not itself: %+v", cmd.Process.Pid, len(all), all)
		}
	}
	st, err := c.Stats(t.Context())
	if err != nil || st.CPU == 0 || st.Memory == 0 {
		t.Errorf("%+v, %v", st, err)
	}
}
