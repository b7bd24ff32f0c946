package testenv

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/internal/testenv/leak"
)

// settleTime is how long what a test did may take to be gone after it.
var settleTime = 20 * time.Second

const (
	// turnTime is how long other packages' tests may keep us waiting.
	turnTime = 15 * time.Minute
	// turnDir and queueDir are the same for all on the machine, unlike TMPDIR. Who holds turnDir has
	// the turn; who holds queueDir is next.
	turnDir  = "/tmp"
	queueDir = "/"
	// worthTelling is a wait that a test's output tells of.
	worthTelling = 100 * time.Millisecond
)

// NoLeaks fails the test if the host is not, at its end, what it was at the
// time of the call: see package leak. roots are directories, which need not
// exist. Cleanups registered later come before the comparison; call t.TempDir
// before, so that its directory is removed after it.
//
// Everything that happens on the machine meanwhile counts, so tests of this
// kind take turns, also with those of other packages, and none may be parallel
// to others of its package.
func NoLeaks(t testing.TB, roots ...string) {
	t.Helper()
	Turn(t)
	before, err := leak.Take(leak.Scope{Roots: roots, Self: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// t.Context has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), settleTime)
		defer cancel()
		diff, err := before.Settle(ctx)
		if err != nil {
			t.Error(err)
		}
		if len(diff) > 0 {
			t.Errorf("the host is not what it was before:\n\t%s", strings.Join(diff, "\n\t"))
		}
	})
}

// Turn waits until no other package's test watches the machine, and keeps them
// waiting until the test's end.
func Turn(t testing.TB) {
	t.Helper()
	begun := time.Now()
	if err := turn.take(); err != nil {
		t.Fatalf("wait for other packages' tests: %v", err)
	}
	if waited := time.Since(begun); waited > worthTelling {
		t.Logf("waited %.1fs for other packages' tests", waited.Seconds()) // testrun adds these up
	}
	t.Cleanup(turn.give)
}

// turn is this process's hold on the machine: tests are a program, and what
// they watch is the one machine.
var turn turnLock

// turnLock counts nested holders of a lock that other processes respect.
type turnLock struct {
	mu      sync.Mutex
	held    int
	release func() error
}

func (l *turnLock) take() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held == 0 {
		// Who has just given a turn back waits behind who is next, so that a package of many such tests
		// does not keep the others out.
		next, err := lockDir(queueDir)
		if err != nil {
			return err
		}
		l.release, err = lockDir(turnDir)
		if err := errors.Join(err, next()); err != nil {
			return err
		}
	}
	l.held++
	return nil
}

func (l *turnLock) give() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held--; l.held == 0 {
		_ = l.release()
	}
}

// lockDir waits for a lock on a directory until turnTime is over. Unlike a lock
// file, it leaves nothing behind.
func lockDir(path string) (release func() error, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), turnTime)
	defer cancel()
	return lock.Path(ctx, path, lock.Exclusive, nil)
}
