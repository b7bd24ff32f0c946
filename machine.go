package smartvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/journal"
	"push.rocks/smartvm/internal/logfile"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/uffd"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/network/catalog"
)

// Machine is one VM. Whichever process started it looks after it; from any other it can be used all the same.
// It is safe for concurrent use.
type Machine struct {
	host   *Host
	record atomic.Pointer[record] // see Update

	mu   sync.Mutex
	busy State // what this process is doing to the VM, "" if nothing
	run  *run  // set while this process looks after the running VM

	secrets *Secrets // of the next start; nil: they are yet to be read
}

// run is a VM's life from start to stop, in the process that looks after it.
type run struct {
	lock     *store.Lock
	journal  *journal.Journal
	proc     *vmm.Process
	client   *firecracker.Client
	started  time.Time
	let      chan struct{} // closed to let go of the VM and leave it running
	done     chan struct{} // closed when all is undone, or let go of
	upkeep   upkeep.Upkeep
	followed time.Time     // when the record was written that the run is after, zero: nobody has looked
	exit     *Exit         // set before done is closed, nil if let go of
	err      error         // of undoing, likewise
	booted   time.Time     // when the guest was made to run
	attended chan struct{} // closed when the guest has nothing more to say
	secrets  *Secrets      // for the guest; nil: it has them, or there are none
	untold   error         // why secrets could not be read for a guest that may wait for them
	memory   *uffd.Session // of a restored VM whose page faults are served here
	recorded *time.Timer   // when those are recorded, by record; nil: they have been before
	record   func()
	command  *CmdExit // of the image's command, set before attended is closed; nil: nobody knows
}

func (h *Host) machine(rec *record) *Machine {
	m := &Machine{host: h}
	m.record.Store(rec)
	return m
}

func (m *Machine) rec() *record { return m.record.Load() }

// ID is the VM's id.
func (m *Machine) ID() string { return m.rec().ID }

// Name is the VM's second name, "" if it has none.
func (m *Machine) Name() string { return m.rec().Spec.Name }

// Spec is what was asked for, with absolute paths. It must not be changed.
func (m *Machine) Spec() Spec { return m.rec().Spec }

// Firecracker is the path of the VMM that the VM was made with.
func (m *Machine) Firecracker() string { return m.rec().Binary }

// RuntimeDir is the VM's own directory.
func (m *Machine) RuntimeDir() string { return m.host.store.Dir(m.rec().ID) }

func (m *Machine) path(name string) string { return filepath.Join(m.RuntimeDir(), name) }

// ConsoleLog and VMMLog are the files with the newest part of what the guest and the VMM wrote. The older half
// of each is beside it, with ".1" added.
func (m *Machine) ConsoleLog() string { return m.path(store.ConsoleLog) }

// VMMLog: see ConsoleLog.
func (m *Machine) VMMLog() string {
	if l := m.rec().Spec.Logger; l != nil && l.LogPath != "" {
		return l.LogPath
	}
	return m.path(store.VMMLog)
}

// root is the VMM's working directory while it runs.
func (m *Machine) root() string {
	return vmm.Root(m.path(store.RunDir), m.rec().ID, m.rec().Binary, m.rec().Jailer != "")
}

// SocketPath is the VMM's API socket while it runs. It may be too long for a socket address.
func (m *Machine) SocketPath() string { return filepath.Join(m.root(), store.SocketFile) }

// make carries out the plan's part that lasts until Remove. The caller has the lock.
func (m *Machine) make(ctx context.Context, rec *record, p *proposal) (err error) {
	j, err := journal.Create(m.path(store.CreateJournal), effects, m.host.opts.trace)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.Close()) }()
	pl := makePlan(&rec.Spec, p)
	if rec.Jailer != "" {
		err := j.Do(ctx, pl.Create[0])
		for i := uint32(1); errors.Is(err, fs.ErrExist) && i < store.UIDs; i++ {
			p.uid = store.UID(m.host.RuntimeDir(), rec.ID, i)
			pl = makePlan(&rec.Spec, p)
			err = j.Do(ctx, pl.Create[0])
		}
		if err != nil {
			return err
		}
		rec.UID, pl.Create = p.uid, pl.Create[1:]
	}
	if len(rec.Interfaces) > 0 {
		if err := attach.Address(ctx, attach.VM{ID: rec.ID, Store: m.host.store}, rec.Interfaces, j.Do); err != nil {
			return err
		}
		told := cmp.Or(rec.Boot, &boot{}).Guest
		if r := rec.Restored; r != nil {
			if err := r.readdress(rec, told != nil); err != nil {
				return err
			}
		}
		if rec.Restored == nil || told != nil { // a restored kernel reads no command line
			if err := attach.Tell(&rec.Spec, told, rec.Interfaces); err != nil {
				return err
			}
		}
		pl = makePlan(&rec.Spec, p)
		pl.Create = pl.Create[min(1, rec.UID):] // without the lease that is taken
	}
	rec.Staged = rec.Boot.staged(&rec.Spec)
	for _, e := range pl.Create {
		file, isFile := e.(*stage.File)
		if isFile && m.host.opts.Progress != nil {
			file.Progress = func(done, total int64) { m.host.opts.Progress(filepath.Base(file.Target), done, total) }
		}
		if err := j.Do(ctx, e); errors.Is(err, unix.ENOSPC) {
			return hint.Add(err, "free space there, name another --runtime-dir, keep the image and --data-dir on one XFS or btrfs, or write in place with \"ephemeral\": false")
		} else if err != nil {
			return err
		}
		if isFile {
			rec.Staged[filepath.Base(file.Target)] = StagedDrive{file.Target, file.Method}
			m.host.log.Debug("staged", "vm", rec.ID, "file", file.Target, "method", file.Method)
		}
	}
	for _, d := range devices(&rec.Spec, p) {
		if d.staged && rec.Restored != nil { // by each start, to where it was to be at first
			method := stage.Copy
			if d.reflinking {
				method = stage.Reflink
			}
			rec.Staged[d.id] = StagedDrive{d.source, method}
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	m.trace("record")
	return rec.write(m.host.store)
}

// erase removes what make made, and all else of the VM. The caller has the lock and gives it up.
func (m *Machine) erase(ctx context.Context, lock *store.Lock) error {
	m.trace("unrecord")
	// The VM is gone from here on, whatever happens; what is left is for Recover.
	err := os.Remove(m.path(store.MachineFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("remove VM %s: %w", m.rec().ID, err), lock.Unlock())
	}
	if err := m.replay(ctx, store.CreateJournal); err != nil {
		return errors.Join(fmt.Errorf("remove VM %s: %w", m.rec().ID, err), lock.Unlock())
	}
	m.trace("remove")
	return m.host.store.Remove(m.rec().ID, lock)
}

// replay undoes a journal of the VM, if there is one. The caller has the lock.
func (m *Machine) replay(ctx context.Context, name string) error {
	j, err := journal.Open(m.path(name), effects, m.host.opts.trace)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(j.Revert(m.host.networks(ctx)), j.Close())
}

// State derives where the VM is. One whose VMM does not say so within a second counts as Running, or as Starting where its guest is not
// known to have run. Returns ErrNotFound once it is removed.
func (m *Machine) State(ctx context.Context) (State, error) {
	state, _, err := m.look(ctx)
	return state, err
}

// look is State, and whether the VMM, if there is one, has said so.
func (m *Machine) look(ctx context.Context) (state State, sure bool, err error) {
	m.mu.Lock()
	busy, r := m.busy, m.run
	m.mu.Unlock()
	switch {
	case busy != "":
		return busy, true, nil
	case r != nil:
		return m.ask(ctx, r.client, r.proc)
	}
	if err := m.exists(); err != nil {
		return "", false, err
	}
	if _, err := os.Stat(m.path(store.RunJournal)); err != nil {
		state, err = m.rested()
		return state, true, err
	}
	p := m.attach()
	alive, err := p.Alive()
	if err != nil {
		return "", false, fmt.Errorf("VM %s: %w", m.rec().ID, err)
	}
	if alive {
		c := m.dialClient()
		defer c.Close()
		return m.ask(ctx, c, p)
	}
	lock, err := m.host.store.TryLock(m.rec().ID)
	if err == nil {
		return Lost, true, lock.Unlock()
	}
	// A start takes the last run's exit away first, and an end writes its own before anything else.
	if exit, err := m.Exit(); err == nil && exit != nil {
		return Stopping, true, nil
	}
	if _, err := os.Lstat(m.SocketPath()); err != nil {
		return Starting, true, nil
	}
	return Stopping, true, nil
}

// exists returns ErrNotFound once the VM is removed, be it that another has got its id.
func (m *Machine) exists() error {
	nonce, err := m.host.store.Nonce(m.rec().ID)
	if errors.Is(err, fs.ErrNotExist) || err == nil && nonce != m.rec().Nonce {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("VM %s: %w", m.rec().ID, err)
	}
	return nil
}

// Supervised says whether a process looks after the VM. One that runs without goes on, but what its guest writes is lost.
func (m *Machine) Supervised() (bool, error) {
	lock, err := m.host.store.TryLock(m.rec().ID)
	switch {
	case errors.Is(err, store.ErrLocked):
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("VM %s: %w", m.rec().ID, err)
	}
	return false, lock.Unlock()
}

// rested tells the states of a VM that has no run.
func (m *Machine) rested() (State, error) {
	exit, err := readExit(m.host.store, m.rec().ID)
	switch {
	case err != nil:
		return "", fmt.Errorf("VM %s: %w", m.rec().ID, err)
	case exit != nil && exit.Outcome == OutcomeFailed:
		return Failed, nil
	case exit != nil && exit.Outcome == OutcomeLost:
		return Lost, nil
	}
	return Stopped, nil
}

// askTimeout bounds how long State waits for a VMM that does not answer.
const askTimeout = time.Second

func (m *Machine) ask(ctx context.Context, c *firecracker.Client, p *vmm.Process) (state State, sure bool, err error) {
	short, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	info, err := c.GetInstanceInfo(short)
	switch {
	case ctx.Err() != nil:
		return "", false, fmt.Errorf("VM %s: %w", m.rec().ID, context.Cause(ctx))
	case err != nil:
		if p.Hung() {
			_ = p.Revert(ctx) // the guest has ended; whoever looks after it sees the end now
		}
		if alive, err := p.Alive(); err == nil && !alive {
			return Stopping, true, nil
		}
		sure = !errors.Is(err, context.DeadlineExceeded) // else it is too busy, or its host is
		if m.ran() {
			return Running, sure, nil
		}
		return Starting, sure, nil
	case info.State == firecracker.StatePaused:
		return Paused, true, nil
	case info.State == firecracker.StateRunning:
		return Running, true, nil
	}
	return Starting, true, nil
}

// ran says whether the VM's run is known to have come so far that its guest ran.
func (m *Machine) ran() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.run != nil {
		return true
	}
	g, err := m.Guest()
	return err == nil && g != nil
}

// attach is the VM's process, as any process sees it.
func (m *Machine) attach() *vmm.Process { return vmm.Attach(m.path(store.RunDir), m.rec().Cgroup) }

// Exit tells how the VM's last run ended, nil if it has not.
func (m *Machine) Exit() (*Exit, error) { return readExit(m.host.store, m.rec().ID) }

// Inspection is all there is to know about a VM. Its JSON form is stable.
type Inspection struct {
	ID                 string                 `json:"id"`
	Name               string                 `json:"name,omitempty"`
	State              State                  `json:"state"`
	Created            time.Time              `json:"created"`
	Started            time.Time              `json:"started,omitzero"` // of a VM that runs
	Exit               *Exit                  `json:"exit,omitempty"`
	Launcher           Launcher               `json:"launcher"`
	UID                int                    `json:"uid,omitempty"` // of the VMM in its jail
	PIDs               []int                  `json:"pids,omitempty"`
	Firecracker        string                 `json:"firecracker"`
	FirecrackerVersion string                 `json:"firecrackerVersion"`
	RuntimeDir         string                 `json:"runtimeDir"`
	Cgroup             string                 `json:"cgroup,omitempty"`
	Socket             string                 `json:"socket,omitempty"` // the VMM's API, while it runs
	Vsock              string                 `json:"vsock,omitempty"`  // where the guest's own connections arrive, with "_PORT" added
	ConsoleLog         string                 `json:"consoleLog"`
	VMMLog             string                 `json:"vmmLog"`
	Staged             map[string]StagedDrive `json:"staged,omitempty"`     // by drive id
	Guest              *GuestState            `json:"guest,omitempty"`      // of the last run, where an agent is in the guest
	Unsynced           bool                   `json:"unsynced,omitempty"`   // what the guest changes, or has, is to be copied back
	Interfaces         []attach.State         `json:"interfaces,omitempty"` // those on networks of ours
	Spec               Spec                   `json:"spec"`
}

// Traffic is what has gone through the VM's interfaces on our networks since its start, in bytes.
func (i *Inspection) Traffic() (received, sent uint64) {
	for _, n := range i.Interfaces {
		received, sent = received+n.ReceivedBytes, sent+n.SentBytes
	}
	return received, sent
}

// Inspect gathers what is known about the VM.
func (m *Machine) Inspect(ctx context.Context) (*Inspection, error) {
	state, err := m.State(ctx)
	if err != nil {
		return nil, err
	}
	r, err := readRecord(m.host.store, m.ID()) // another process may have changed it
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
		ConsoleLog: m.ConsoleLog(), VMMLog: m.VMMLog(), Staged: r.Staged, Interfaces: interfaces, Spec: r.Spec,
	}
	if i.Guest, err = m.Guest(); err != nil {
		return nil, err
	}
	if r.Jailer != "" {
		i.Launcher = LaunchJailed
	}
	if _, err := os.Stat(m.path(store.PendingFile)); err == nil {
		i.Unsynced = true
	}
	if state == Running || state == Paused {
		if fi, err := os.Stat(m.path(store.RunJournal)); err == nil {
			i.Started = fi.ModTime().UTC()
		}
		i.Socket = m.SocketPath()
		if r.Spec.Vsock != nil {
			i.Vsock = filepath.Join(m.root(), store.VsockFile)
		}
		i.PIDs, err = m.attach().PIDs()
		if err != nil {
			return nil, err
		}
	} else if i.Exit, err = m.Exit(); err != nil {
		return nil, err
	}
	return i, nil
}

// fail wraps what went wrong with what the VMM and the guest last said.
func (m *Machine) fail(stage string, err error, exit *Exit) error {
	return &MachineError{
		ID: m.rec().ID, Stage: stage, Err: err, Exit: exit,
		Log: logfile.Tail(m.VMMLog(), tailBytes), Console: logfile.Tail(m.ConsoleLog(), tailBytes),
	}
}

// tailBytes is how much of each log goes into an error.
const tailBytes = 1 << 10
