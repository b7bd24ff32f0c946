// Package storelock has the locks of a directory in which many processes keep things that never
// change: those that use them share it, those that remove some have it alone, and those that make
// some lock only what they make.
package storelock

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/lock"
)

// Dir is such a directory. All paths must be there.
type Dir struct {
	Path string // is locked itself
	Gate string // is locked by those that wait for Path
	Temp string // a directory of what is being made, each part locked by who makes it; the rest is rubbish
	// Waiting is told for what another process is waited for.
	Waiting func(what string)
}

// Share keeps others from having the directory alone until it is released. Who shares it must not
// share it again, since a process that waits for having it alone comes first. What is said to be
// waited for.
func (d *Dir) Share(ctx context.Context, what string) (release func() error, err error) {
	return d.enter(ctx, lock.Shared, what)
}

// Alone waits until nobody shares the directory, and clears away what those that died were making.
func (d *Dir) Alone(ctx context.Context, what string) (release func() error, err error) {
	release, err = d.enter(ctx, lock.Exclusive, what)
	if err != nil {
		return nil, err
	}
	if err := d.tidy(); err != nil {
		return nil, errors.Join(err, release())
	}
	return release, nil
}

// enter takes the store's lock by way of another, which who waits has alone: so those that come one
// after the other, each before the last has gone, do not keep out for good who wants the store
// alone.
func (d *Dir) enter(ctx context.Context, how lock.Mode, what string) (release func() error, err error) {
	gate, err := d.Lock(ctx, d.Gate, how, what)
	if err != nil {
		return nil, err
	}
	release, err = d.Lock(ctx, d.Path, how, what)
	if err := errors.Join(err, gate()); err != nil {
		if release != nil {
			err = errors.Join(err, release())
		}
		return nil, err
	}
	return release, nil
}

// tidy removes what was half made by processes that are gone: nobody has that locked.
func (d *Dir) tidy() error {
	entries, err := os.ReadDir(d.Temp)
	if err != nil {
		return fmt.Errorf("clear away what is unfinished: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(d.Temp, e.Name())
		f, err := kept.OpenPlain(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // by another meanwhile
		}
		if err != nil {
			err = os.RemoveAll(path) // no file or directory: none of ours
		} else {
			err = lock.Try(f, lock.Exclusive)
			if errors.Is(err, lock.ErrHeld) {
				err = f.Close()
			} else {
				err = errors.Join(err, os.RemoveAll(path), f.Close())
			}
		}
		if err != nil {
			return fmt.Errorf("clear away what is unfinished: %w", err)
		}
	}
	return nil
}

// Begin tidies, if nobody holds the store, before something is made.
func (d *Dir) Begin() error {
	f, err := os.Open(d.Path)
	if err != nil {
		return fmt.Errorf("lock store: %w", err)
	}
	if lock.Try(f, lock.Exclusive) == nil {
		err = d.tidy()
	}
	return errors.Join(err, f.Close())
}

// Lock takes a lock on a file or directory, which must be there. The lock dies with the process.
func (d *Dir) Lock(ctx context.Context, path string, how lock.Mode, what string) (release func() error, err error) {
	if release, err = lock.Path(ctx, path, how, func() { d.Waiting(what) }); err != nil {
		return nil, fmt.Errorf("lock store: %w", err)
	}
	return release, nil
}

// One makes the making of one thing exclusive: one process does, others wait. The lock's file stays
// until the store is tidied.
func (d *Dir) One(ctx context.Context, kind, key, what string) (release func() error, err error) {
	sum := sha256.Sum256([]byte(key))
	path := filepath.Join(d.Temp, "lock-"+kind+"-"+hex.EncodeToString(sum[:]))
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock store: %w", err)
		}
		if err := lock.Wait(ctx, f, lock.Exclusive, func() { d.Waiting(what) }); err != nil {
			return nil, errors.Join(fmt.Errorf("lock store: %w", err), f.Close())
		}
		if lock.StillAt(f, path) {
			return f.Close, nil
		}
		if err := f.Close(); err != nil { // the store was tidied meanwhile
			return nil, err
		}
	}
}

// Work is a directory in which something is made. It is locked, so that nobody takes it for what a
// process that died has left: who makes something need not hold the store meanwhile.
type Work struct {
	Dir  string
	lock *os.File
}

// Work makes one. The caller closes it.
func (d *Dir) Work() (*Work, error) {
	for {
		dir, err := os.MkdirTemp(d.Temp, "new-")
		if err != nil {
			return nil, fmt.Errorf("make a place to work: %w", err)
		}
		f, err := os.Open(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue // tidied, before it was locked
		}
		if err != nil {
			return nil, fmt.Errorf("make a place to work: %w", err)
		}
		err = lock.Try(f, lock.Exclusive)
		if err == nil && lock.StillAt(f, dir) {
			return &Work{dir, f}, nil
		}
		if err != nil && !errors.Is(err, lock.ErrHeld) {
			return nil, errors.Join(fmt.Errorf("make a place to work: %w", err), f.Close())
		}
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
}

// Close removes what is in it.
func (w *Work) Close() error { return errors.Join(os.RemoveAll(w.Dir), w.lock.Close()) }
