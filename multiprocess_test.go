package smartvm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/store"
)

// Many processes on one runtime directory.

func init() { children["host"] = hostChild }

// request is what a host in another process is asked to do.
type request struct {
	Op      string // create, start, stop, remove, state, recover, run, restore, mounts
	Ref     string
	Spec    smartvm.Spec
	Stop    smartvm.StopOptions
	Restore smartvm.RestoreOptions
}

// reply is what came of it.
type reply struct {
	ID       string // of the VM that was made
	Text     string // a state, how it was stopped, the mounts
	Report   *smartvm.Report
	Err      string
	State    bool // the error is ErrState
	NotFound bool // it is ErrNotFound
	Exists   bool // it is ErrExists
	Killed   bool // it is about a VMM that somebody killed
}

// sharedMounts asks for a process in a mount namespace of its own, whose mounts are passed on to
// namespaces made from it and back.
const sharedMounts = "shared mounts"

// hostChild serves requests until its standard input ends.
func hostChild(args []string) int {
	var opts smartvm.Options
	if err := json.Unmarshal([]byte(args[0]), &opts); err != nil {
		panic(err)
	}
	if args[1] == "without cgroups" {
		opts = smartvm.WithoutCgroups(opts)
	}
	if args[2] == sharedMounts {
		// As systemd has it: what is mounted below is seen above.
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
			panic(err)
		}
	}
	h, err := smartvm.Open(opts)
	if err != nil {
		panic(err)
	}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var q request
		if err := in.Decode(&q); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			panic(err)
		}
		a, err := serve(context.Background(), h, q)
		if err != nil {
			a.Err = err.Error()
			a.State, a.NotFound, a.Exists = errors.Is(err, smartvm.ErrState), errors.Is(err, smartvm.ErrNotFound),
				errors.Is(err, smartvm.ErrExists)
			me, ok := errors.AsType[*smartvm.MachineError](err)
			a.Killed = ok && me.Exit != nil && me.Exit.Outcome == smartvm.OutcomeKilled
		}
		if err := out.Encode(a); err != nil {
			panic(err)
		}
	}
	if err := h.Close(); err != nil {
		panic(err)
	}
	return 0
}

func serve(ctx context.Context, h *smartvm.Host, q request) (a reply, err error) {
	switch q.Op {
	case "create":
		m, err := h.Create(ctx, q.Spec)
		if err == nil {
			a.ID = m.ID()
		}
		return a, err
	case "run":
		exit, err := h.Run(ctx, q.Spec, smartvm.RunOptions{})
		a.Text = fmt.Sprintf("%+v", exit)
		return a, err
	case "restore":
		m, err := h.Restore(ctx, q.Ref, q.Restore)
		if err == nil {
			a.ID = m.ID()
		}
		return a, err
	case "recover":
		a.Report, err = h.Recover(ctx)
		return a, err
	case "watch":
		go func() {
			panic(h.Watch(ctx, func(_ *smartvm.Report, err error) {
				if err != nil {
					panic(err)
				}
			}))
		}()
		return a, nil
	case "mounts":
		text, err := os.ReadFile("/proc/self/mounts")
		a.Text = string(text)
		return a, err
	}
	m, err := h.Machine(ctx, q.Ref)
	if err != nil {
		return a, err
	}
	a.ID = m.ID()
	switch q.Op {
	case "start":
		err = m.Start(ctx)
	case "stop":
		a.Text, err = m.Stop(ctx, q.Stop)
	case "remove":
		err = m.Remove(ctx)
	case "state":
		var state smartvm.State
		state, err = m.State(ctx)
		a.Text = string(state)
	default:
		panic(q.Op)
	}
	return a, err
}

// remote is a host in another process.
type remote struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

// remote starts a process with a host on the site's runtime directory.
func (s *site) remote() *remote {
	s.t.Helper()
	return s.remoteWith("")
}

func (s *site) remoteWith(surroundings string) *remote {
	s.t.Helper()
	opts, err := json.Marshal(s.options)
	if err != nil {
		s.t.Fatal(err)
	}
	cgroups := "with cgroups"
	if !smartvm.UsesCgroups(s.options) {
		cgroups = "without cgroups"
	}
	r := &remote{t: s.t, cmd: exec.Command(os.Args[0], string(opts), cgroups, surroundings)}
	if surroundings == sharedMounts {
		r.cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	}
	// The race detector sleeps for a second at the end, unless told not to.
	r.cmd.Env = append(os.Environ(), "SMARTVM_TEST_CHILD=host", "GORACE=atexit_sleep_ms=0")
	r.cmd.Stderr = s.t.Output()
	if r.in, err = r.cmd.StdinPipe(); err != nil {
		s.t.Fatal(err)
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	r.out = json.NewDecoder(out)
	if err := r.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = r.in.Close()
		if err := r.cmd.Wait(); err != nil && r.cmd.ProcessState == nil {
			s.t.Error(err)
		}
	})
	return r
}

func (r *remote) send(q request) {
	r.t.Helper()
	if err := json.NewEncoder(r.in).Encode(q); err != nil {
		r.t.Fatal(err)
	}
}

func (r *remote) receive() (a reply) {
	r.t.Helper()
	if err := r.out.Decode(&a); err != nil {
		r.t.Fatalf("the other process: %v", err)
	}
	return a
}

// ask wants an answer without an error.
func (r *remote) ask(q request) reply {
	r.t.Helper()
	r.send(q)
	a := r.receive()
	if a.Err != "" {
		r.t.Fatalf("%s %s: %s", q.Op, q.Ref, a.Err)
	}
	return a
}

// kill ends the process as a crash would.
func (r *remote) kill() {
	r.t.Helper()
	if err := r.cmd.Process.Kill(); err != nil {
		r.t.Fatal(err)
	}
	_ = r.cmd.Wait()
}

// startedBy has another process make and start a VM.
func (s *site) startedBy(r *remote, h *smartvm.Host, guest string) *smartvm.Machine {
	s.t.Helper()
	id := r.ask(request{Op: "create", Spec: s.spec(guest)}).ID
	r.ask(request{Op: "start", Ref: id})
	m, err := h.Machine(s.t.Context(), id)
	if err != nil {
		s.t.Fatal(err)
	}
	return m
}

// A VM can be used from any process, not only from the one that supervises it.
func TestProcesses_Share(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		other, h := s.remote(), s.open()
		m := s.startedBy(other, h, "idle")
		wantState(t, m, smartvm.Running)
		if watched, err := m.Supervised(); err != nil || !watched {
			t.Errorf("supervised: %v, %v", watched, err)
		}
		if i, err := m.Inspect(t.Context()); err != nil || len(i.PIDs) == 0 || i.Started.IsZero() {
			t.Errorf("inspect: %+v, %v", i, err)
		}
		if err := m.Pause(t.Context()); err != nil {
			t.Error(err)
		}
		if got := other.ask(request{Op: "state", Ref: m.ID()}).Text; got != string(smartvm.Paused) {
			t.Errorf("to its own process it is %s, want paused", got)
		}
		if err := m.Resume(t.Context()); err != nil {
			t.Error(err)
		}
		if report, err := h.Recover(t.Context()); err != nil || len(report.Adopted)+len(report.Recovered)+
			len(report.Removed) > 0 {
			t.Errorf("recovery took what another supervises: %+v, %v", report, err)
		}
		if err := m.Adopt(t.Context()); !errors.Is(err, smartvm.ErrState) {
			t.Errorf("adopt what another supervises: %v, want ErrState", err)
		}
		if err := m.Start(t.Context()); !errors.Is(err, smartvm.ErrState) {
			t.Errorf("start: %v, want ErrState", err)
		}
		if err := m.Remove(t.Context()); !errors.Is(err, smartvm.ErrState) {
			t.Errorf("remove: %v, want ErrState", err)
		}
		ended := make(chan error, 1)
		go func() {
			exit, err := m.Wait(t.Context())
			if err == nil && (exit.Outcome != smartvm.OutcomeKilled || exit.Signal != "SIGKILL") {
				err = fmt.Errorf("it ended %+v", exit)
			}
			ended <- err
		}()
		if how, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil || how != smartvm.Killed {
			t.Errorf("stopped by %q, %v", how, err)
		}
		if err := <-ended; err != nil {
			t.Errorf("wait: %v", err)
		}
		if got := other.ask(request{Op: "state", Ref: m.ID()}).Text; got != string(smartvm.Stopped) {
			t.Errorf("to its own process it is %s, want stopped", got)
		}
		other.ask(request{Op: "start", Ref: m.ID()})
		wantState(t, m, smartvm.Running)
		other.ask(request{Op: "stop", Ref: m.ID()})
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		other.send(request{Op: "state", Ref: m.ID()})
		if a := other.receive(); !a.NotFound {
			t.Errorf("to its own process the removed VM is %+v", a)
		}
	})
}

// together asks all processes at once.
func together(remotes []*remote, q request) []reply {
	for _, r := range remotes {
		r.send(q)
	}
	var all []reply
	for _, r := range remotes {
		all = append(all, r.receive())
	}
	return all
}

// oneWins checks that one got through, and that the others were told why not.
func oneWins(t *testing.T, what string, all []reply, refusal func(reply) bool) {
	t.Helper()
	won := 0
	for _, a := range all {
		switch {
		case a.Err == "":
			won++
		case !refusal(a):
			t.Errorf("%s: %s", what, a.Err)
		}
	}
	if won != 1 {
		t.Errorf("%s: %d got through, want one", what, won)
	}
}

func TestProcesses_OneWins(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		remotes := []*remote{s.remote(), s.remote(), s.remote()}
		spec := s.spec("idle")
		spec.ID, spec.Name = "contended", "name"
		for range 4 {
			oneWins(t, "create", together(remotes, request{Op: "create", Spec: spec}), func(a reply) bool { return a.Exists })
			for range 2 {
				oneWins(t, "start", together(remotes, request{Op: "start", Ref: spec.ID}), func(a reply) bool { return a.State })
				for _, a := range together(remotes, request{Op: "stop", Ref: spec.ID}) {
					if a.Err != "" {
						t.Errorf("stop: %s", a.Err)
					}
				}
			}
			oneWins(t, "remove", together(remotes, request{Op: "remove", Ref: spec.ID}), func(a reply) bool {
				return a.NotFound
			})
		}
	})
}

func TestProcesses_CreateAtOnce(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	remotes := []*remote{s.remote(), s.remote(), s.remote(), s.remote()}
	spec := s.spec("idle")
	ids := map[string]bool{}
	for range 5 { // each has an id of its own
		for _, a := range together(remotes, request{Op: "create", Spec: spec}) {
			if a.Err != "" {
				t.Errorf("create: %s", a.Err)
			}
			ids[a.ID] = true
		}
	}
	spec.Name = "one"
	all := together(remotes, request{Op: "create", Spec: spec})
	oneWins(t, "create of one name", all, func(a reply) bool {
		return a.Exists && strings.Contains(a.Err, `"one" is taken by VM `)
	})
	for _, a := range all {
		if a.Err == "" {
			ids[a.ID] = true
		}
	}
	h := s.open()
	machines, err := h.Machines(t.Context())
	if err != nil || len(machines) != 21 || len(ids) != 21 {
		t.Errorf("%d VMs are there of %d that were made, %v", len(machines), len(ids), err)
	}
	for _, m := range machines {
		if !ids[m.ID()] {
			t.Errorf("nobody made %s", m.ID())
		}
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// Processes that do as they like with a few VMs get in each other's way, and no further.
func TestProcesses_Melee(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		const rounds = 25
		remotes := []*remote{s.remote(), s.remote(), s.remote()}
		rng := rand.New(rand.NewPCG(5, 6))
		ops := []string{"create", "create", "start", "start", "stop", "remove", "state", "recover"}
		seen := map[string]int{}
		for range rounds {
			asked := make([]request, len(remotes))
			for i, r := range remotes {
				spec := s.spec([]string{"idle", "reboot"}[rng.IntN(2)])
				spec.ID = []string{"one", "two"}[rng.IntN(2)]
				asked[i] = request{Op: ops[rng.IntN(len(ops))], Ref: spec.ID, Spec: spec}
				r.send(asked[i])
			}
			for i, r := range remotes {
				a := r.receive()
				switch {
				case a.Err == "":
					seen[asked[i].Op]++
				case a.State, a.NotFound, a.Exists:
				case a.Killed && asked[i].Op == "start": // by another's stop
				default:
					t.Errorf("%s %s: %s", asked[i].Op, asked[i].Ref, a.Err)
				}
			}
		}
		t.Logf("done: %v", seen)
		h := s.open()
		machines, err := h.Machines(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range machines {
			s.stopAndRemove(m)
		}
	})
}

// vmmProcess is the VMM's process.
func vmmProcess(t *testing.T, m *smartvm.Machine) int {
	t.Helper()
	var pid int
	eventually(t, "the VMM's process is known", func() bool {
		i, err := m.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(i.PIDs) > 0 {
			pid = i.PIDs[0]
		}
		return pid != 0
	})
	return pid
}

func wantReport(t *testing.T, got *smartvm.Report, err error, want smartvm.Report) {
	t.Helper()
	for _, list := range []*[]string{&want.Adopted, &want.Unattended, &want.Recovered, &want.Removed} {
		if *list == nil {
			*list = []string{}
		}
	}
	if diff := cmp.Diff(&want, got); err != nil || diff != "" {
		t.Errorf("%v\n-want +got:\n%s", err, diff)
	}
}

// A VM outlives the process that supervised it, and another takes it up.
func TestProcesses_StarterDies(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		other, h := s.remote(), s.open()
		m := s.startedBy(other, h, "count")
		other.kill()
		wantState(t, m, smartvm.Running)
		if watched, err := m.Supervised(); err != nil || watched {
			t.Errorf("supervised by the dead: %v, %v", watched, err)
		}
		report, err := h.Sweep(t.Context())
		wantReport(t, report, err, smartvm.Report{Unattended: []string{m.ID()}})
		if s.console.get(m.ID()) != "" {
			t.Error("a sweep adopted it")
		}
		report, err = h.Recover(t.Context())
		wantReport(t, report, err, smartvm.Report{Adopted: []string{m.ID()}})
		eventually(t, "the console goes on", func() bool { return strings.Count(s.console.get(m.ID()), "\n") > 10 })
		if m, err = h.Machine(t.Context(), m.ID()); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(m.Pause(t.Context()), m.Resume(t.Context())); err != nil {
			t.Error(err)
		}
		if err := syscall.Kill(vmmProcess(t, m), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		exit, err := m.Wait(t.Context())
		if err != nil || !adoptedKilled(t, exit) {
			t.Fatalf("it ended %+v, %v, want it killed", exit, err)
		}
		state, err := m.State(t.Context())
		if err != nil || (state == smartvm.Lost) != (exit.Outcome == smartvm.OutcomeLost) {
			t.Errorf("it is %s, %v, and ended %s", state, err, exit)
		}
		if err := m.Start(t.Context()); err != nil {
			t.Errorf("start again: %v", err)
		}
		wantState(t, m, smartvm.Running)
		s.stopAndRemove(m)
	})
}

// What died with its VMM is undone by whoever comes next, whatever he came for.
func TestProcesses_StarterAndVMMDie(t *testing.T) {
	for name, next := range map[string]func(*testing.T, *smartvm.Host, *smartvm.Machine) error{
		"recover": func(t *testing.T, h *smartvm.Host, m *smartvm.Machine) error {
			report, err := h.Recover(t.Context())
			wantReport(t, report, err, smartvm.Report{Recovered: []string{m.ID()}})
			return nil
		},
		"start": func(t *testing.T, _ *smartvm.Host, m *smartvm.Machine) error { return m.Start(t.Context()) },
		"stop": func(t *testing.T, _ *smartvm.Host, m *smartvm.Machine) error {
			_, err := m.Stop(t.Context(), smartvm.StopOptions{})
			return err
		},
		"wait": func(t *testing.T, _ *smartvm.Host, m *smartvm.Machine) error {
			exit, err := m.Wait(t.Context())
			if err == nil && exit.Outcome != smartvm.OutcomeLost {
				err = fmt.Errorf("it ended %+v, want lost", exit)
			}
			return err
		},
		"remove": func(t *testing.T, _ *smartvm.Host, m *smartvm.Machine) error { return m.Remove(t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, smartvm.LaunchDirect)
			other, h := s.remote(), s.open()
			m := s.startedBy(other, h, "idle")
			pid := vmmProcess(t, m)
			other.kill()
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is lost", func() bool {
				state, err := m.State(t.Context())
				return err == nil && state == smartvm.Lost
			})
			if err := next(t, h, m); err != nil {
				t.Error(err)
			}
			if name != "remove" {
				s.stopAndRemove(m)
			}
		})
	}
}

// Who waits for a lost VM that somebody is starting waits for that run, and kills nothing.
func TestProcesses_WaitBesideStart(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	other, h := s.remote(), s.open()
	m := s.startedBy(other, h, "idle")
	pid := vmmProcess(t, m)
	other.kill()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit, err := m.Wait(t.Context()); err != nil || exit.Outcome != smartvm.OutcomeLost {
		t.Fatalf("it ended %+v, %v, want lost", exit, err)
	}
	about, err := m.Inspect(t.Context())
	if err != nil || about.Cgroup == "" {
		t.Fatalf("%+v, %v", about, err)
	}
	// As a start: the lock is held for a while, and then there is a process in the VM's group.
	all, err := store.Open(s.options.RuntimeDir)
	if err != nil {
		t.Fatal(err)
	}
	lock, err := all.TryLock(m.ID())
	if err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() {
		exit, err := m.Wait(t.Context())
		if err == nil && (exit == nil || exit.Outcome != smartvm.OutcomeLost) {
			err = fmt.Errorf("it ended %+v, want lost", exit)
		}
		waited <- err
	}()
	inVain := func() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if exit, err := m.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("it ended %+v, %v, want to wait for it still", exit, err)
		}
	}
	inVain()
	if err := os.MkdirAll(about.Cgroup, 0o755); err != nil { // what is above it goes with the last VM of anybody
		t.Fatal(err)
	}
	group, err := os.Open(about.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()
	vmm := exec.Command("sleep", "600")
	vmm.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd()), Pdeathsig: syscall.SIGKILL}
	if err := vmm.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- vmm.Wait() }()
	inVain()
	select {
	case err := <-ended:
		t.Fatalf("a wait has ended the VMM that another was starting: %v", err)
	default:
	}
	if err := vmm.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-ended
	if err := errors.Join(os.Remove(about.Cgroup), lock.Unlock()); err != nil {
		t.Fatal(err)
	}
	_ = os.Remove(filepath.Dir(about.Cgroup)) // unless there are others in it
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// A VM without a process that supervises it can be stopped without taking it up before.
func TestProcesses_StopUnattended(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		other, h := s.remote(), s.open()
		m := s.startedBy(other, h, "key")
		other.kill()
		how, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: 20 * time.Second})
		if err != nil || how != smartvm.CtrlAltDel {
			t.Errorf("stopped by %q, %v, want %q", how, err, smartvm.CtrlAltDel)
		}
		if left, err := os.ReadDir(filepath.Join(m.RuntimeDir(), "run")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("left of the run: %v, %v", left, err)
		}
		s.stopAndRemove(m)
	})
}

// A VM that is one call's does not outlive the process of that call.
func TestProcesses_RunnerDies(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		other, h := s.remote(), s.open()
		spec := s.spec("idle")
		spec.ID = "attached"
		other.send(request{Op: "run", Spec: spec})
		eventually(t, "it runs", func() bool {
			m, err := h.Machine(t.Context(), spec.ID)
			if err != nil {
				return false
			}
			state, err := m.State(t.Context())
			return err == nil && state == smartvm.Running
		})
		report, err := h.Recover(t.Context())
		wantReport(t, report, err, smartvm.Report{})
		other.kill()
		report, err = h.Recover(t.Context())
		wantReport(t, report, err, smartvm.Report{Removed: []string{spec.ID}})
		if _, err := h.Machine(t.Context(), spec.ID); !errors.Is(err, smartvm.ErrNotFound) {
			t.Errorf("it is still there: %v", err)
		}
	})
}

// The same at moments that nobody chose.
func TestProcesses_RunnerDiesAtRandom(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			s := newSite(t, launcher)
			h := s.open()
			rng := rand.New(rand.NewPCG(7, 8))
			guests := []string{"idle", "reboot", "count"}
			for i := range 15 {
				other := s.remote()
				other.ask(request{Op: "recover"}) // it is up
				spec := s.spec(guests[i%len(guests)])
				spec.Name = "unlucky"
				spec.Vsock = &smartvm.Vsock{GuestCID: 3, UDSPath: s.path("vsock")}
				other.send(request{Op: "run", Spec: spec})
				time.Sleep(time.Duration(rng.IntN(80_000)) * time.Microsecond) // the moment is the test
				other.kill()
				// A process that it was about to start may hold the VM's lock for a moment more.
				eventually(t, fmt.Sprintf("after %d no VM is left", i), func() bool {
					if _, err := h.Recover(t.Context()); err != nil {
						t.Error(err)
					}
					all, err := h.Machines(t.Context())
					return err == nil && len(all) == 0
				})
				for _, dir := range []string{"runtime", "runtime/.leases", "runtime/.networks", "runtime/.slots", "data/staging"} {
					entries, err := os.ReadDir(s.path(dir))
					if err != nil {
						t.Fatal(err)
					}
					if entries = slices.DeleteFunc(entries, func(e os.DirEntry) bool {
						return slices.Contains([]string{".leases", ".networks", ".slots", ".events"}, e.Name())
					}); len(entries) > 0 {
						t.Fatalf("after %d: left in %s: %v", i, dir, entries)
					}
				}
			}
		})
	}
}
