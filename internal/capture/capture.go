// Package capture writes down a VM that runs: its guest is brought to rest, the VM paused, what it
// is written to files, and it goes on, whatever happened meanwhile.
package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/snapshot"
)

// MetadataFile is in a snapshot: the guest's metadata, which a VMM's own snapshot leaves out.
const MetadataFile = "metadata"

// VM is one to be captured.
type VM struct {
	Name    string // what people call it
	Client  *firecracker.Client
	Process *vmm.Process
	Root    string // the VMM's working directory
	UID     int    // the VMM's user in its jail; 0: it is not jailed
	Running bool   // else it is paused, and stays so
	Hold    *store.Hold
	// Agent is in its guest, or may be; nil: nobody can be. Booting says that it has not come so far,
	// or is not well.
	Agent   *agent.Client
	Booting bool
	// Drives are the paths of what is copied, by device id.
	Drives   map[string]string
	Metadata bool // it has metadata
	Balloon  bool // it has a balloon
	// Forget is called when the VMM is about to lose what it knows of memory that was written.
	Forget func() error
	Trace  func(step string)
}

// Options say how.
type Options struct {
	Base       string // a memory file that the VMM completes; "": it writes all of it
	Hook       string // a program in the guest
	DropCaches bool   // and have its balloon take what it does not use
	// End is called when all is written, while the VM still stands still. If it returns nil, the VM
	// ends, else it goes on, as it does where End is nil.
	End func(Result) error
}

// Result is what is worth knowing about it.
type Result struct {
	Paused   time.Duration
	Balloon  *uint32 // MiB that a balloon is to have which took more for this; nil: it did not
	Warnings []string
}

// Capture writes the VM's state, memory, drives and metadata into the directory dir.
func (v *VM) Capture(ctx context.Context, dir string, o Options) (r Result, err error) {
	if o.Base != "" {
		if err := (&stage.File{Source: o.Base, Target: filepath.Join(dir, snapshot.MemoryFile), UID: -1}).Apply(
			ctx); err != nil {
			return r, err
		}
	}
	undo, ended, begun := context.WithoutCancel(ctx), false, time.Time{}
	if !v.Running && v.Agent != nil {
		r.Warnings = append(r.Warnings,
			"the VM was paused: its programs are not at rest, and go on in one that is restored before it knows who it is")
	}
	if mib, ok := v.Hold.Deflates(); ok { // somebody has died in the middle of this
		r.Warnings = append(r.Warnings, v.deflate(ctx, mib)...)
	}
	if !v.listens() && o.Hook != "" { // half of what it does would do harm
		return r, fmt.Errorf("run %s in the guest: nobody there can be asked", o.Hook)
	}
	if v.Agent == nil && o.DropCaches {
		r.Warnings = append(r.Warnings, "nobody in the guest can be told to drop its caches")
	}
	if v.Running && v.Agent != nil {
		defer func() {
			if !ended {
				r.Warnings = append(r.Warnings, v.thaw(undo, o)...)
			}
		}()
		frozen, warnings, err := v.freeze(ctx, o)
		if r.Warnings = append(r.Warnings, warnings...); err != nil {
			return r, err
		}
		if frozen != nil {
			defer frozen.Close()
		}
	}
	if v.listens() && v.Balloon && o.DropCaches {
		var warning error
		if r.Balloon, warning = v.inflate(ctx); warning != nil {
			r.Warnings = append(r.Warnings, warning.Error())
		}
		if r.Balloon != nil {
			defer func() {
				if !ended {
					r.Warnings = append(r.Warnings, v.deflate(undo, *r.Balloon)...)
				}
			}()
		}
	}
	v.Trace("pause")
	if v.Running {
		begun = time.Now()
		defer func() {
			v.Trace("resume")
			if !ended {
				err = errors.Join(err, v.Client.Resume(undo))
			}
			r.Paused = time.Since(begun)
		}()
		if err := errors.Join(v.Hold.MustResume(), v.Client.Pause(ctx)); err != nil {
			return r, err
		}
	}
	if err := v.write(ctx, dir, o.Base != ""); err != nil {
		return r, err
	}
	if err := errors.Join(v.copyDrives(ctx, dir), v.metadata(ctx, dir), v.stood(ctx)); err != nil || o.End == nil {
		return r, err
	}
	if v.Running {
		r.Paused = time.Since(begun)
	}
	if err := o.End(r); err != nil {
		return r, err
	}
	err = v.Process.Revert(undo)
	ended = err == nil
	return r, err
}

// listens says whether there is somebody in the guest who does as he is told.
func (v *VM) listens() bool { return v.Running && v.Agent != nil && !v.Booting }

// Swaps says whether this host has anything to swap to: what is there is not in memory, which is
// where the VMM looks for changes.
func Swaps() bool {
	list, err := os.ReadFile("/proc/swaps")
	return err == nil && strings.Count(string(list), "\n") > 1 // the first is the heading
}

// CorruptsDiffs says whether a VMM of version v writes diffs that are wrong, and says nothing of
// it, of a VM with that much memory: 1.14.0 and 1.14.1 do where memory lies in several slots, as on
// x86 above 3 GiB, or with memory hotplug.
func CorruptsDiffs(v firecracker.Version, memSizeMiB int, hotplug bool) bool {
	const firstSlot = 3 << 10 // MiB
	broken := v.AtLeast(firecracker.Version{Major: 1, Minor: 14}) &&
		!v.AtLeast(firecracker.Version{Major: 1, Minor: 14, Patch: 2})
	return broken && (hotplug || runtime.GOARCH == "amd64" && memSizeMiB > firstSlot)
}

// stood says whether the VM still stands still: if not, its drives are not those of the moment of
// its memory.
func (v *VM) stood(ctx context.Context) error {
	info, err := v.Client.GetInstanceInfo(ctx)
	if err == nil && info.State != firecracker.StatePaused {
		err = errors.New("somebody has resumed the VM meanwhile")
	}
	return err
}

// patience bounds how long a guest may take to come to rest: it has to write out what it holds in
// memory.
const patience = 15 * time.Second

// freeze brings the guest to rest, until what it returns is closed. One that cannot be asked is
// taken as it is.
func (v *VM) freeze(ctx context.Context, o Options) (frozen io.Closer, warnings []string, err error) {
	if v.Booting {
		return nil, []string{"the guest has not finished booting, or does not answer: it may not survive being restored"}, nil
	}
	if err := RunHook(ctx, v.Agent, o.Hook, HookFreeze); err != nil {
		return nil, nil, err
	}
	v.Trace("freeze")
	short, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if frozen, err = v.Agent.Freeze(short, o.DropCaches); err != nil {
		warnings = append(warnings, fmt.Sprintf("the guest was not brought to rest: %v", err))
	}
	return frozen, warnings, nil
}

// thaw lets the guest go on, as soon as it listens again: making the snapshot has cut off who it
// spoke with.
func (v *VM) thaw(ctx context.Context, o Options) (warnings []string) {
	if v.Booting {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	v.Trace("thaw")
	if err := Retry(ctx, func() error { return v.Agent.Thaw(ctx) }); err != nil {
		v.Hold.Keep()
		return []string{
			fmt.Sprintf(
				"VM %s: its programs stand still until somebody tells the guest to go on, as who supervises it tries to: %v",
				v.Name, err),
		}
	}
	if err := RunHook(ctx, v.Agent, o.Hook, HookThaw); err != nil {
		return []string{fmt.Sprintf("VM %s: %v", v.Name, err)}
	}
	return nil
}

// What a hook is told.
const (
	HookFreeze = "freeze"
	HookThaw   = "thaw"
)

// RunHook runs a program in a guest, unless it is "". It must end well, and soon.
func RunHook(ctx context.Context, a *agent.Client, hook, what string) error {
	if hook == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	exit, err := a.Exec(ctx, guest.Cmd{Args: []string{hook, what}})
	if err == nil && exit.Code != 0 {
		err = fmt.Errorf("exit code %d", exit.Code)
	}
	if err != nil {
		return fmt.Errorf("run %s %s in the guest: %w", hook, what, err)
	}
	return nil
}

// retryPause is that between two questions to an agent.
const retryPause = 10 * time.Millisecond

// Retry asks a guest again that has just been paused or restored, since its first connections may
// be cut off.
func Retry(ctx context.Context, ask func() error) error {
	for {
		err := ask()
		if err == nil || ctx.Err() != nil {
			return err
		}
		pause := retryPause
		if _, refused := errors.AsType[*agent.GuestError](err); refused {
			pause = time.Second // it will hardly think better of it at once
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// write has the VMM write its state and memory. It gets files that it may write to, in a directory
// where it may make none.
func (v *VM) write(ctx context.Context, dir string, diff bool) error {
	for _, name := range []string{snapshot.StateFile, snapshot.MemoryFile} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE, 0o600)
		if err == nil && v.UID != 0 {
			err = f.Chown(v.UID, v.UID)
		}
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			return err
		}
	}
	if err := os.Chmod(dir, 0o711); err != nil { // the VMM's user goes through it
		return err
	}
	unshare, err := v.Process.Share(v.Root, store.TakeDir, dir, v.UID != 0)
	if err != nil {
		return err
	}
	if err := v.Forget(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, unshare())
	}
	params := firecracker.SnapshotCreateParams{
		SnapshotPath: filepath.Join(store.TakeDir, snapshot.StateFile),
		MemFilePath:  filepath.Join(store.TakeDir, snapshot.MemoryFile),
		SnapshotType: firecracker.SnapshotFull,
	}
	if diff {
		params.SnapshotType = firecracker.SnapshotDiff
	}
	v.Trace("PUT /snapshot/create")
	err = create(ctx, v.Client, params)
	if err != nil && isFull(dir) {
		err = hint.Add(fmt.Errorf("%w: %w", unix.ENOSPC, err),
			"free space there, or name another --data-dir: it takes as much as the VM has memory")
	}
	return errors.Join(err, unshare())
}

// create has the VMM write a snapshot. A VMM that can leaves out the sync: the files are synced
// when the snapshot is committed, for which the VM need not stand still. Builds of what is to
// become 1.17 may not know the field.
func create(ctx context.Context, c *firecracker.Client, params firecracker.SnapshotCreateParams) error {
	params.SyncSnapshotFiles = new(bool)
	err := c.CreateSnapshot(ctx, params)
	fault, ok := errors.AsType[*firecracker.APIError](err)
	if errors.Is(err, firecracker.ErrNotSupported) || ok &&
		strings.Contains(fault.Fault, "unknown field `sync_snapshot_files`") {
		params.SyncSnapshotFiles = nil
		err = c.CreateSnapshot(ctx, params)
	}
	return err
}

// isFull says whether there is no room to speak of where dir is.
func isFull(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && int64(st.Bavail)*st.Bsize < 1<<20
}

func (v *VM) copyDrives(ctx context.Context, dir string) error {
	if len(v.Drives) == 0 {
		return nil
	}
	drives := filepath.Join(dir, snapshot.DrivesDir)
	if err := os.Mkdir(drives, 0o700); err != nil {
		return err
	}
	for id, path := range v.Drives {
		v.Trace("copy drive")
		if err := (&stage.File{Source: path, Target: filepath.Join(drives, id), UID: -1}).Apply(ctx); err != nil {
			return err
		}
	}
	return nil
}

// metadata keeps the guest's metadata, beside the memory, which is as secret.
func (v *VM) metadata(ctx context.Context, dir string) error {
	if !v.Metadata {
		return nil
	}
	data, err := v.Client.GetMMDS(ctx)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, MetadataFile), data, 0o600)
}
