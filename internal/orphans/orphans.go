// Package orphans learns, without polling, which VMs of a runtime directory may have lost the
// process that supervised them.
//
// A supervisor has its VM's lock file open for writing. When it dies, or releases the VM, the
// kernel closes the file, of which inotify tells (IN_CLOSE_WRITE); of new VMs it tells by their
// directories. A child process that was forked and has not yet called exec delays that, as it
// delays the end of the lock.
package orphans

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/store"
)

// State is what a look at a VM has shown.
type State int

const (
	// Settled means that nothing is to be done for the VM until its lock is released once more.
	Settled State = iota
	// Locked means that a process has the VM's lock.
	Locked
	// Left means that something is still to be done, as what was tried failed.
	Left
)

// Pauses between looks at a VM. The kernel tells that a lock file is closed a moment before it ends
// the lock: where it finds the VM locked, looks are repeated until the pause is longer than
// lockedPause. Where something is left to be done, the first pause is leftPause.
const (
	minPause    = time.Millisecond
	pauseFactor = 8
	lockedPause = time.Second
	leftPause   = time.Second
	maxPause    = time.Minute
)

// watcher follows one runtime directory.
type watcher struct {
	store *store.Store
	look  func(ctx context.Context, id string) State
	fd    int
	stop  context.CancelCauseFunc

	mu    sync.Mutex
	ids   map[int32]string // of the VMs whose lock files are watched, by watch descriptor
	again map[string]bool  // there: a look at the VM is under way; true: another one is due then
	looks sync.WaitGroup
}

// Watch calls look for each VM of s, and again when its lock may have been released, until ctx
// ends, whose cause it returns. Looks at one VM come one after another, those at several at the
// same time.
func Watch(ctx context.Context, s *store.Store, look func(ctx context.Context, id string) State) error {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("watch runtime directory: %w", err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	ctx, stop := context.WithCancelCause(ctx)
	w := &watcher{store: s, look: look, fd: fd, stop: stop, ids: map[int32]string{}, again: map[string]bool{}}
	defer w.looks.Wait()
	defer stop(nil)
	if _, err := unix.InotifyAddWatch(fd, s.Path(), unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_ONLYDIR); err != nil {
		return fmt.Errorf("watch runtime directory %s: %w", s.Path(), err)
	}
	defer context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Unix(1, 0)) })()
	if err := w.kickAll(ctx); err != nil {
		return err
	}
	buf := make([]byte, 16<<10)
	for {
		n, err := events.Read(buf)
		if err == nil {
			err = w.handle(ctx, buf[:n])
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("watch runtime directory: %w", err)
		}
	}
}

// handle reads events: see inotify(7).
func (w *watcher) handle(ctx context.Context, buf []byte) error {
	for len(buf) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(buf)) //nolint:gosec // -1 of an overflow too
		mask := binary.NativeEndian.Uint32(buf[4:])
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buf[12:]))
		name := strings.TrimRight(string(buf[unix.SizeofInotifyEvent:size]), "\x00")
		buf = buf[size:]
		switch {
		case mask&unix.IN_Q_OVERFLOW != 0:
			if err := w.kickAll(ctx); err != nil {
				return err
			}
		case mask&unix.IN_IGNORED != 0:
			w.mu.Lock()
			delete(w.ids, wd)
			w.mu.Unlock()
		case mask&unix.IN_ISDIR != 0:
			if !strings.HasPrefix(name, ".") {
				w.kick(ctx, name)
			}
		case mask&unix.IN_CLOSE_WRITE != 0:
			w.mu.Lock()
			id := w.ids[wd]
			w.mu.Unlock()
			if id != "" {
				w.kick(ctx, id)
			}
		}
	}
	return nil
}

func (w *watcher) kickAll(ctx context.Context) error {
	ids, err := w.store.List()
	for _, id := range ids {
		w.kick(ctx, id)
	}
	return err
}

// kick has a VM looked at, after a look that is under way.
func (w *watcher) kick(ctx context.Context, id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, busy := w.again[id]; busy {
		w.again[id] = true
		return
	}
	w.again[id] = false
	w.looks.Go(func() {
		for w.attend(ctx, id); w.more(ctx, id); {
			w.attend(ctx, id)
		}
	})
}

// more says whether a VM is to be looked at once more.
func (w *watcher) more(ctx context.Context, id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.again[id] && ctx.Err() == nil {
		w.again[id] = false
		return true
	}
	delete(w.again, id)
	return false
}

// attend looks at a VM until it is settled, is surely locked or is gone.
func (w *watcher) attend(ctx context.Context, id string) {
	for pause := minPause; ctx.Err() == nil; pause = min(pause*pauseFactor, maxPause) {
		state, err := Locked, w.follow(id)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // as where a user has too many
			w.stop(fmt.Errorf("watch VM %s: %w", id, err))
			return
		}
		if _, gone := os.Lstat(w.store.Dir(id)); errors.Is(gone, fs.ErrNotExist) {
			return
		}
		// Without a lock file it is just being made or removed, if the process that does so has not
		// died.
		if err == nil || pause > lockedPause {
			state = w.look(ctx, id)
		}
		switch {
		case state == Settled, state == Locked && pause > lockedPause:
			return
		case state == Left:
			pause = max(pause, leftPause)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// follow watches a VM's lock file, if it does not yet.
func (w *watcher) follow(id string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	path := filepath.Join(w.store.Dir(id), store.LockFile)
	wd, err := unix.InotifyAddWatch(w.fd, path, unix.IN_CLOSE_WRITE|unix.IN_DONT_FOLLOW)
	if err == nil {
		w.ids[int32(wd)] = id //nolint:gosec // of the kernel's
	}
	return err
}
