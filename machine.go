package smartvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/internal/vmrun"
	"push.rocks/smartvm/network/catalog"
	"push.rocks/smartvm/spec"
)

// Machine is one VM. The process that started it supervises it; it can be used from any other as
// well. It is safe for concurrent use.
type Machine struct {
	host *Host
	vm   *vmrun.VM
}

func (m *Machine) rec() *plan.Record { return m.vm.Record() }

// ID is the VM's id.
func (m *Machine) ID() string { return m.rec().ID }

// Name is the VM's second name, "" if it has none.
func (m *Machine) Name() string { return m.rec().Spec.Name }

// Spec is what was asked for, with absolute paths. It must not be changed.
func (m *Machine) Spec() Spec { return m.rec().Spec }

// Firecracker is the path of the VMM that the VM was made with.
func (m *Machine) Firecracker() string { return m.rec().Binary }

// RuntimeDir is the VM's own directory.
func (m *Machine) RuntimeDir() string { return m.vm.Dir() }

// ConsoleLog and VMMLog are the files with the newest part of what the guest and the VMM wrote. The
// older half of each is beside it, with ".1" added.
func (m *Machine) ConsoleLog() string { return m.vm.Path(store.ConsoleLog) }

// VMMLog: see ConsoleLog.
func (m *Machine) VMMLog() string { return m.vm.VMMLog() }

// CommandLog is the output of the command of a Run, kept as ConsoleLog is; there is none if the
// console has it.
func (m *Machine) CommandLog() string { return m.vm.Path(store.CommandLog) }

// SocketPath is the VMM's API socket while it runs. It may be too long for a socket address.
func (m *Machine) SocketPath() string { return filepath.Join(m.vm.Root(), store.SocketFile) }

// State derives where the VM is. If its VMM does not answer within a second, it counts as Running,
// or as Starting where its guest is not known to have run. Returns ErrNotFound once it is removed.
func (m *Machine) State(ctx context.Context) (State, error) { return m.vm.State(ctx) }

// Supervised says whether a process supervises the VM. Without one it goes on, but what its guest
// writes is lost.
func (m *Machine) Supervised() (bool, error) { return m.vm.Supervised() }

// Exit tells how the VM's last run ended. Returns ErrState if none has.
func (m *Machine) Exit() (*Exit, error) {
	exit, err := m.vm.Exit()
	if err == nil && exit == nil {
		err = fmt.Errorf("exit of VM %s: %w: no run of it has ended", m.ID(), ErrState)
	}
	return exit, err
}

// Start starts the VM and returns when its guest runs; the guest's own boot takes longer. This
// process supervises the VM from then on, until it ends or the Host is closed. If the start fails,
// all of it is undone, the error is a *MachineError, and Start may be called again.
func (m *Machine) Start(ctx context.Context) error {
	lock, err := m.vm.Acquire(ctx, "start")
	if err != nil {
		return err
	}
	_, err = m.vm.Start(ctx, lock, nil)
	return err
}

// DefaultStopTimeout is how long a guest may take to shut down before it is killed.
const DefaultStopTimeout = 10 * time.Second

// StopOptions say how to end a VM.
type StopOptions struct {
	// Timeout is how long the guest may take to shut down when it is asked to. 0: it is killed at
	// once.
	Timeout time.Duration
}

// AgentStop, CtrlAltDel and Killed are the ways in which Stop ends a VM.
const (
	AgentStop  = vmrun.AgentStop
	CtrlAltDel = vmrun.CtrlAltDel
	Killed     = vmrun.Killed
)

// Stop ends the VM and waits until its run is cleaned up. The guest is asked to shut down by its
// agent, or where none answers by Ctrl-Alt-Del (x86_64). An image's command gets its stop signal,
// SIGTERM if the image names none; an init shuts down as it does on Ctrl-Alt-Del. A VM that has not
// ended in time is killed. Stop returns AgentStop, CtrlAltDel or Killed, or "" if the VM was not
// running. It works from any process. The VM's copies of drives stay until Remove.
func (m *Machine) Stop(ctx context.Context, opts StopOptions) (string, error) {
	return m.vm.Stop(ctx, opts.Timeout)
}

// ConsoleInput opens the input of a running VM's serial console: what is written to it is typed
// there. It works from any process, and bytes of several are read in the order of their writes. A
// write returns when the VMM has it or will have it; if some 4 KiB wait and the guest has read
// nothing for five seconds, it returns ErrUnread, and ErrState when the VM has ended. The caller
// closes it. Returns ErrState if the VM does not run, or was started by a smartvm that gave it no
// input.
func (m *Machine) ConsoleInput(ctx context.Context) (io.WriteCloser, error) {
	if err := m.vm.Allowed(ctx, "call", "write to console of"); err != nil {
		return nil, err
	}
	in, err := vmm.OpenInput(m.vm.Path(store.RunDir))
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", m.ID(), err)
	}
	return in, nil
}

// Wait returns when the VM's run has ended and is undone, how it ended, and what could not be
// undone. It returns at once if the VM does not run, ErrNotFound if it is removed meanwhile,
// ErrState if it has never run, ErrClosed if this process supervised it and the Host is closed.
func (m *Machine) Wait(ctx context.Context) (*Exit, error) { return m.vm.Wait(ctx) }

// Remove deletes a VM that does not run, and its copies of drives.
func (m *Machine) Remove(ctx context.Context) error { return m.vm.Remove(ctx) }

// Adopt supervises a VM that runs and whose supervisor has died. Returns ErrState if it does not
// run or is supervised.
func (m *Machine) Adopt(ctx context.Context) error {
	if err := m.vm.Allowed(ctx, "call", "adopt"); err != nil {
		return err
	}
	lock, err := m.host.env.Store.TryLock(m.ID())
	if err != nil {
		return fmt.Errorf("adopt VM %s: %w: %w", m.ID(), ErrState, err)
	}
	return m.vm.Adopt(lock)
}

// Discard forgets what the guest of a VM that does not run has changed in volumes and could not be
// copied back.
func (m *Machine) Discard() error { return m.vm.Discard() }

// Secrets reads the files that the Spec's Secrets and EnvFiles name, nil if there are none. A Start
// does so by itself.
func (m *Machine) Secrets() (*Secrets, error) { return m.vm.Secrets() }

// Provide gives the next Start in this process what Secrets has returned in another.
func (m *Machine) Provide(s *Secrets) { m.vm.Provide(s) }

// Inspection is all there is to know about a VM. Its JSON form is stable.
type Inspection struct {
	ID                 string    `json:"id"`
	Name               string    `json:"name,omitempty"`
	State              State     `json:"state"`
	Created            time.Time `json:"created"`
	Started            time.Time `json:"started,omitzero"` // of a VM that runs
	Exit               *Exit     `json:"exit,omitempty"`
	Launcher           Launcher  `json:"launcher"`
	UID                int       `json:"uid,omitempty"` // of the VMM in its jail
	PIDs               []int     `json:"pids,omitempty"`
	Firecracker        string    `json:"firecracker"`
	FirecrackerVersion string    `json:"firecrackerVersion"`
	RuntimeDir         string    `json:"runtimeDir"`
	Cgroup             string    `json:"cgroup,omitempty"`
	Socket             string    `json:"socket,omitempty"` // the VMM's API, while it runs
	// where the guest's own connections arrive, with "_PORT" added
	Vsock      string                 `json:"vsock,omitempty"`
	ConsoleLog string                 `json:"consoleLog"`
	VMMLog     string                 `json:"vmmLog"`
	Staged     map[string]StagedDrive `json:"staged,omitempty"` // by drive id
	// of the last run, where an agent is in the guest
	Guest *GuestState `json:"guest,omitempty"`
	// what the guest changes, or has, is to be copied back
	Unsynced   bool        `json:"unsynced,omitempty"`
	Interfaces []Interface `json:"interfaces,omitempty"` // those on networks of ours
	// MemoryHotplug and BalloonHinting are there while a VM runs whose Spec has them. They are nil too
	// where the VMM does not say.
	MemoryHotplug  *MemoryHotplugStatus `json:"memoryHotplug,omitempty"`
	BalloonHinting *BalloonHinting      `json:"balloonHinting,omitempty"`
	Spec           Spec                 `json:"spec"`
}

// Inspect gathers what is known about the VM.
func (m *Machine) Inspect(ctx context.Context) (*Inspection, error) {
	state, err := m.State(ctx)
	if err != nil {
		return nil, err
	}
	r, err := plan.Read(m.host.env.Store, m.ID()) // another process may have changed it
	if err != nil {
		return nil, err
	}
	interfaces, err := attach.States(r.Interfaces, m.RuntimeDir(), catalog.Refresher(m.host.Networks))
	if err != nil {
		return nil, err
	}
	i := &Inspection{
		ID: r.ID, Name: r.Spec.Name, State: state, Created: r.Created, Launcher: LaunchDirect, UID: r.UID,
		Firecracker: r.Binary, FirecrackerVersion: r.BinaryVersion, RuntimeDir: m.RuntimeDir(), Cgroup: r.Cgroup,
		ConsoleLog: m.ConsoleLog(), VMMLog: m.VMMLog(), Staged: r.Staged, Interfaces: interfacesOf(interfaces), Spec: r.Spec,
	}
	if i.Guest, err = m.vm.Guest(); err != nil {
		return nil, err
	}
	if r.Jailer != "" {
		i.Launcher = LaunchJailed
	}
	if _, err := os.Stat(m.vm.Path(store.PendingFile)); err == nil {
		i.Unsynced = true
	}
	if state == Running || state == Paused {
		if fi, err := os.Stat(m.vm.Path(store.RunJournal)); err == nil {
			i.Started = fi.ModTime().UTC()
		}
		i.Socket = m.SocketPath()
		if r.Spec.Vsock != nil {
			i.Vsock = filepath.Join(m.vm.Root(), store.VsockFile)
		}
		i.PIDs, err = m.vm.Process().PIDs()
		if err != nil {
			return nil, err
		}
		if r.Spec.MemoryHotplug != nil {
			if s, err := m.MemoryHotplug(ctx); err == nil {
				i.MemoryHotplug = &s
			}
		}
		if b := r.Spec.Balloon; b != nil && b.FreePageHinting {
			if s, err := m.BalloonHinting(ctx); err == nil {
				i.BalloonHinting = &s
			}
		}
	} else if i.Exit, err = m.vm.Exit(); err != nil {
		return nil, err
	}
	return i, nil
}

// ReadScratch gives read the path of the ext4 that has what a VM of an image has written, while
// nothing in it changes: programs of a VM that runs are frozen meanwhile. Returns ErrNotSupported
// for other VMs, and ErrState.
func (m *Machine) ReadScratch(ctx context.Context, read func(path string) error) error {
	in, err := m.host.env.Look(m.rec())
	if err != nil {
		return err
	}
	all := in.Devices()
	at := slices.IndexFunc(all, func(d plan.Device) bool { return d.ID == spec.ScratchDrive })
	if at < 0 || !in.HasAgent() {
		return fmt.Errorf("read what VM %s has written: %w: it has no disk over an image", in.ID, ErrNotSupported)
	}
	switch state, err := m.State(ctx); {
	case err != nil:
		return err
	case state.AtRest():
		lock, err := m.vm.Acquire(ctx, "start")
		if err != nil {
			return err
		}
		return errors.Join(read(all[at].Source), lock.Unlock())
	case state != Running:
		return &StateError{ID: in.ID, Op: "read the disk of", State: state, Want: []State{Running, Stopped}}
	}
	hold, err := m.vm.Freeze("read the disk of")
	if err != nil {
		return err
	}
	frozen, err := m.vm.Agent().Freeze(ctx, false)
	if err == nil {
		err = errors.Join(read(all[at].Source), frozen.Close())
	}
	return errors.Join(err, hold.Release())
}
