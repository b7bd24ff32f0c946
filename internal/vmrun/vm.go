// Package vmrun makes VMs, runs them in the process that supervises them, and lets all processes of
// the host look at them, stop them and remove them.
package vmrun

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/logfile"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/uffd"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/status"
)

// Env is what the VMs of a host share in this process. Its fields are not changed once there are
// VMs.
type Env struct {
	plan.Host
	Log          *slog.Logger
	Trace        journal.Trace // may be nil
	StartTimeout time.Duration
	RepairEvery  time.Duration                             // how often a running VM is repaired without an event
	Context      func(ctx context.Context) context.Context // adds what network effects share
	Memory       func() *uffd.Server                       // makes it once
	Console      func(id string) io.Writer                 // may be nil, and return nil
	Progress     func(drive string, done, total int64)     // of the copy of a drive, in bytes; may be nil
	LookupEnv    func(name string) (value string, ok bool) // for files of the environment; may be nil
	Event        func(e status.Event)                      // takes what happens to VMs

	mu      sync.Mutex
	closed  bool
	running map[string]*VM // those that this process supervises, by id
}

// VM is one VM. Whichever process started it supervises it; all others can use it as well. It is
// safe for concurrent use.
type VM struct {
	env    *Env
	record atomic.Pointer[plan.Record] // see SetRecord

	mu      sync.Mutex
	busy    status.State   // what this process is doing to the VM, "" if nothing
	run     *Run           // set while this process supervises the running VM
	secrets *guest.Secrets // of the next start; nil: they are yet to be read
}

// VM returns the VM of a record.
func (e *Env) VM(rec *plan.Record) *VM {
	v := &VM{env: e}
	v.record.Store(rec)
	return v
}

// Open returns a VM that is there: the same as long as this process supervises it. Returns
// ErrNotFound.
func (e *Env) Open(id string) (*VM, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if v := e.running[id]; v != nil {
		return v, nil
	}
	rec, err := plan.Read(e.Store, id)
	if errors.Is(err, fs.ErrNotExist) {
		err = status.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("VM %q: %w", id, err)
	}
	return e.VM(rec), nil
}

// Close releases the VMs that this process supervises and leaves them running. It waits for the
// undoing of runs that have ended. No VM is started or adopted afterwards.
func (e *Env) Close() error {
	e.mu.Lock()
	owned := slices.Collect(maps.Values(e.running))
	e.closed = true
	e.mu.Unlock()
	errs := make([]error, len(owned))
	var wg sync.WaitGroup
	for i, v := range owned {
		wg.Go(func() { errs[i] = v.release() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (e *Env) isClosed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.closed
}

// supervising says that this process supervises a VM, or no longer does. It returns false if it
// must not, as the Env is closed.
func (e *Env) supervising(v *VM, yes bool) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !yes {
		delete(e.running, v.Record().ID)
		return true
	}
	if e.running == nil {
		e.running = map[string]*VM{}
	}
	if !e.closed {
		e.running[v.Record().ID] = v
	}
	return !e.closed
}

// Record is what the VM is. It must not be changed.
func (v *VM) Record() *plan.Record { return v.record.Load() }

// Dir is the VM's own directory, Path a file in it.
func (v *VM) Dir() string { return v.env.Store.Dir(v.Record().ID) }

// Path: see Dir.
func (v *VM) Path(name string) string { return filepath.Join(v.Dir(), name) }

// Root is the VMM's working directory while it runs.
func (v *VM) Root() string {
	rec := v.Record()
	return vmm.Root(v.Path(store.RunDir), rec.ID, rec.Binary, rec.Jailer != "")
}

// VMMLog is the file with the newest part of what the VMM wrote.
func (v *VM) VMMLog() string {
	if l := v.Record().Spec.Logger; l != nil && l.LogPath != "" {
		return l.LogPath
	}
	return v.Path(store.VMMLog)
}

// Process is the VM's process, as any process sees it.
func (v *VM) Process() *vmm.Process { return vmm.Attach(v.Path(store.RunDir), v.Record().Cgroup) }

// Dial returns a client of the VM's VMM, whichever process started that. The caller closes it.
func (v *VM) Dial() *firecracker.Client {
	return firecracker.New(func(ctx context.Context) (net.Conn, error) {
		return vmm.DialSocket(ctx, v.Root(), store.SocketFile)
	}, v.Record().VMM())
}

// Agent returns a client of the agent in the VM's guest.
func (v *VM) Agent() *agent.Client {
	return &agent.Client{Dial: func(ctx context.Context) (net.Conn, error) {
		return vmm.DialSocket(ctx, v.Root(), store.VsockFile)
	}}
}

// Event says what has happened to the VM. Attributes are names and values by turns.
func (v *VM) Event(kind status.EventType, attributes ...string) {
	e := status.Event{Type: kind, VM: v.Record().ID, Name: v.Record().Spec.Name}
	for i := 0; i+1 < len(attributes); i += 2 {
		if attributes[i+1] == "" {
			continue
		}
		if e.Attributes == nil {
			e.Attributes = map[string]string{}
		}
		e.Attributes[attributes[i]] = attributes[i+1]
	}
	v.env.Event(e)
}

// Exists returns ErrNotFound once the VM is removed, even if another VM has its id now.
func (v *VM) Exists() error {
	rec := v.Record()
	nonce, err := v.env.Store.Nonce(rec.ID)
	if errors.Is(err, fs.ErrNotExist) || err == nil && nonce != rec.Nonce {
		err = status.ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("VM %s: %w", rec.ID, err)
	}
	return nil
}

// Exit tells how the VM's last run ended, nil if it has not.
func (v *VM) Exit() (*status.Exit, error) { return plan.ReadExit(v.env.Store, v.Record().ID) }

// current is the run that this process supervises, nil if it does not.
func (v *VM) current() *Run {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.run
}

func (v *VM) set(busy status.State, r *Run) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.busy, v.run = busy, r
}

// tailBytes is how much of each log goes into an error.
const tailBytes = 1 << 10

// Fail wraps what went wrong with what the VMM and the guest last wrote.
func (v *VM) Fail(stage string, err error, exit *status.Exit) error {
	return &status.MachineError{
		ID: v.Record().ID, Stage: stage, Err: err, Exit: exit,
		Log: logfile.Tail(v.VMMLog(), tailBytes), Console: logfile.Tail(v.Path(store.ConsoleLog), tailBytes),
	}
}

// TraceCall lets the crash matrix strike between requests too.
func (v *VM) TraceCall(step string) {
	if v.env.Trace != nil {
		v.env.Trace(journal.Step{Op: "call", Kind: step})
	}
}
