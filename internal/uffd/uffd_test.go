package uffd_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/uffd"
)

const testPages = 1024

// memoryFile has pages that say which they are.
func memoryFile(t testing.TB, dir string) string {
	t.Helper()
	data := make([]byte, testPages*page)
	for i := range testPages {
		copy(data[i*page:], fmt.Sprintf("page %d", i))
	}
	path := filepath.Join(dir, "memory")
	if err := os.WriteFile(path, data, 0o444); err != nil {
		t.Fatal(err)
	}
	return path
}

// filePage is which page of the file a page of the fake VMM's memory is.
func filePage(i int) int { return (i + testPages/2) % testPages }

func content(i int) string { return fmt.Sprintf("page %d", filePage(i)) }

// alarm takes what a session that fails says.
type alarm chan error

func (a alarm) tell(err error) { a <- err }

func (a alarm) await(t testing.TB) error {
	t.Helper()
	select {
	case err := <-a:
		return err
	case <-time.After(patience):
		t.Fatal("no alarm")
		return nil
	}
}

func (a alarm) silent(t testing.TB) {
	t.Helper()
	select {
	case err := <-a:
		t.Errorf("alarm: %v", err)
	default:
	}
}

func newServer(t testing.TB) *uffd.Server {
	t.Helper()
	s := uffd.NewServer(nil)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// serve starts a fake VMM and serves it.
func serve(t testing.TB, s *uffd.Server, o uffd.Options, misdeed ...string) (*uffd.Session, *vmm, alarm) {
	t.Helper()
	requireUFFD(t)
	a := make(alarm, 1)
	o.Failed, o.UID, o.GID = a.tell, os.Getuid(), os.Getgid()
	if o.Socket == "" {
		o.Socket = filepath.Join(t.TempDir(), "s")
	}
	session, err := s.Listen(o)
	if err != nil {
		t.Fatal(err)
	}
	size := testPages * page
	if fi, err := os.Stat(o.Memory); err == nil {
		size = int(fi.Size())
	}
	return session, startChild(t, "vmm", append([]string{o.Socket, fmt.Sprint(size)}, misdeed...)...), a
}

func await(t testing.TB, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s did not come", what)
	}
}

func TestSession_Serves(t *testing.T) {
	dir := t.TempDir()
	memory := memoryFile(t, dir)
	testenv.NoLeaks(t, dir)
	s := uffd.NewServer(nil)
	session, vm, a := serve(t, s, uffd.Options{Memory: memory, Socket: filepath.Join(dir, "s")})
	vm.want("connected")
	await(t, "ready", session.Ready())
	if _, err := os.Lstat(filepath.Join(dir, "s")); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	// From the last to the first, so that chunks come from behind.
	for i := testPages - 1; i >= 0; i-- {
		vm.ask(content(i), "read %d", i)
	}
	vm.ask("written", "write 7")
	vm.ask("w"+content(7)[1:], "read 7")
	if got := s.Sessions(); len(got) != 1 || got[0] != session {
		t.Errorf("sessions %v", got)
	}
	// The VM ends by itself: no alarm, and nothing is left.
	vm.tell("end")
	if err := vm.in.(interface{ Close() error }).Close(); err != nil {
		t.Fatal(err)
	}
	vm.awaitEnd()
	await(t, "the session's end", session.Done())
	a.silent(t)
	st := session.Stats()
	want := uffd.Stats{Faults: 16, Copied: testPages, PageSize: page, Guarded: true}
	if diff := cmp.Diff(want, st); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	touched := session.Touched()
	if diff := cmp.Diff(
		&uffd.Set{PageSize: page, Size: testPages * page, Ranges: []uffd.Range{{First: 0, Pages: testPages}}},
		touched); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if err := errors.Join(session.Err(), session.Close(), session.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	if len(s.Sessions()) > 0 {
		t.Error("it is still a session")
	}
	if _, err := s.Listen(uffd.Options{Memory: filepath.Join(dir, "memory"), Socket: filepath.Join(dir, "s")}); !errors.Is(
		err, uffd.ErrClosed) {
		t.Errorf("listen after close: %v", err)
	}
}

// What was touched once is there before it is touched again.
func TestSession_Prefetch(t *testing.T) {
	dir := t.TempDir()
	s := newServer(t)
	memory := memoryFile(t, dir)
	pages := []int{0, 1, 100, 300, 511, 512, 900, 1023}
	read := func(set *uffd.Set) (*uffd.Session, uffd.Stats) {
		session, vm, _ := serve(t, s, uffd.Options{Memory: memory, Prefetch: set})
		vm.want("connected")
		await(t, "ready", session.Ready())
		for _, i := range pages {
			vm.ask(content(i), "read %d", i)
		}
		must(t, session.Close())
		vm.awaitEnd()
		return session, session.Stats()
	}
	first, before := read(nil)
	if before.Faults != 7 || before.Prefetched != 0 {
		t.Errorf("without a set: %+v", before)
	}
	path := filepath.Join(dir, "set")
	must(t, uffd.WriteSet(path, first.Touched()))
	set, err := uffd.ReadSet(path)
	must(t, err)
	kept := len(set.Ranges)
	second, after := read(set)
	if after.Faults != 0 || after.Prefetched != before.Copied || after.Copied != before.Copied {
		t.Errorf("with a set: %+v, without: %+v", after, before)
	}
	if diff := cmp.Diff(first.Touched(), second.Touched()); diff != "" || len(set.Ranges) != kept ||
		set.Pages() != before.Copied {
		t.Errorf("the set has become another: %s, %+v", diff, set)
	}
	// One of another memory is of no use, and does no harm.
	set.Size += page
	if _, st := read(set); st != before {
		t.Errorf("with a foreign set: %+v", st)
	}
}

// Pages that were given back are zeros, whether they had been there or not.
func TestSession_Removed(t *testing.T) {
	s := newServer(t)
	session, vm, a := serve(t, s, uffd.Options{Memory: memoryFile(t, t.TempDir())})
	vm.want("connected")
	vm.ask(content(3), "read 3")
	vm.ask("written", "write 4")
	vm.ask("dropped <nil>", "drop 2 4")
	for _, i := range []int{2, 3, 4, 5} {
		vm.ask("", "read %d", i)
	}
	vm.ask(content(6), "read 6")
	vm.ask("written", "write 3")
	vm.ask("w", "read 3")
	vm.ask("dropped <nil>", "drop 3 1")
	vm.ask("", "read 3")
	// Across the regions, of which nothing is there.
	vm.ask("dropped <nil>", "drop 500 24")
	vm.ask("", "read 511")
	vm.ask("", "read 512")
	vm.ask(content(499), "read 499")
	vm.ask(content(524), "read 524")
	must(t, session.Close())
	if st := session.Stats(); st.Removed != 4+1+24 || st.Zeroed != 4+1+2 {
		t.Errorf("%+v", st)
	}
	a.silent(t)
}

// A thread gives pages back while another touches one of them: it finds what was there or zeros,
// and both go on.
func TestSession_RemovedMeanwhile(t *testing.T) {
	s := newServer(t)
	session, vm, a := serve(t, s, uffd.Options{Memory: memoryFile(t, t.TempDir())})
	vm.want("connected")
	for i := 0; i+8 <= testPages; i += 8 {
		vm.tell("dropread %d 8", i)
		// It may have been dropped while it was read.
		got, ok := strings.CutPrefix(vm.answer(), "dropped <nil> ")
		if !ok || !strings.HasPrefix(content(i+7), got) {
			t.Fatalf("page %d: %q", i+7, got)
		}
		for j := i; j < i+8; j++ {
			vm.ask("", "read %d", j)
		}
	}
	t.Logf("%+v", session.Stats())
	a.silent(t)
}

// Many VMs of one memory, all of which are served and end with the server.
func TestServer_ManyVMs(t *testing.T) {
	dir := t.TempDir()
	memory := memoryFile(t, dir)
	testenv.NoLeaks(t, dir)
	s := uffd.NewServer(nil)
	var vms []*vmm
	var sessions []*uffd.Session
	for i := range 8 {
		session, vm, _ := serve(t, s, uffd.Options{Memory: memory, Socket: filepath.Join(dir, fmt.Sprint("s", i))})
		vms, sessions = append(vms, vm), append(sessions, session)
	}
	for _, vm := range vms {
		vm.want("connected")
	}
	for i := 0; i < testPages; i += 37 {
		for _, vm := range vms {
			vm.tell("read %d", i)
		}
		for _, vm := range vms {
			vm.want(content(i))
		}
	}
	must(t, s.Close())
	for i, vm := range vms {
		vm.awaitEnd()
		if sessions[i].Err() != nil {
			t.Error(sessions[i].Err())
		}
	}
	must(t, s.Close())
}

// What a VMM sends is checked; one that sends something else is killed, and its caller told.
func TestSession_Hostile(t *testing.T) {
	testenv.NoLeaks(t)
	for _, misdeed := range []string{"noJSON", "noFD", "twoFDs", "manyFDs", "otherFD", "endless", "small"} {
		t.Run(misdeed, func(t *testing.T) {
			dir := t.TempDir()
			memory := memoryFile(t, dir)
			s := uffd.NewServer(nil)
			session, vm, a := serve(t, s, uffd.Options{Memory: memory, Socket: filepath.Join(dir, "s")}, misdeed)
			if misdeed == "noFD" || misdeed == "noJSON" {
				// It may still be sending: that is over when it ends, or after a while.
				vm.want("connected")
				must(t, vm.cmd.Process.Kill())
			} else if err := a.await(t); !errors.Is(err, uffd.ErrProtocol) || !errors.Is(session.Err(), uffd.ErrProtocol) {
				t.Errorf("alarm: %v, %v", err, session.Err())
			}
			vm.awaitEnd()
			await(t, "the session's end", session.Done())
			must(t, s.Close())
		})
	}
}

func TestSession_SlowMessage(t *testing.T) {
	s := newServer(t)
	_, vm, _ := serve(t, s, uffd.Options{Memory: memoryFile(t, t.TempDir())}, "slow")
	vm.want("connected")
	vm.ask(content(9), "read 9")
}

// A VMM of another user, as a jailed one is, can connect, is guarded, and nobody else can connect.
func TestSession_OtherUser(t *testing.T) {
	requireUFFD(t)
	testenv.Require(t, testenv.Root)
	const uid = 1_900_000_000
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755)) //nolint:gosec // others shall come here
	s := newServer(t)
	o := uffd.Options{Memory: memoryFile(t, dir), Socket: filepath.Join(dir, "s"), UID: uid, GID: uid}
	defer unix.Umask(unix.Umask(0))
	session, err := s.Listen(o)
	must(t, err)
	if fi, err := os.Lstat(o.Socket); err != nil || fi.Sys().(*syscall.Stat_t).Uid != uid || fi.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v", fi, err)
	}
	stranger := startChild(t, "vmm", o.Socket, fmt.Sprint(testPages*page))
	_ = stranger.answer() // it is let in or refused before it has sent all
	vm := startAs(t, uid, "vmm", o.Socket, fmt.Sprint(testPages*page))
	vm.want("connected")
	vm.ask(content(5), "read 5")
	if st := session.Stats(); !st.Guarded {
		t.Errorf("%+v", st)
	}
	must(t, session.Close())
	vm.awaitEnd()
}

// Whoever does not know what a VMM will do waits no longer than he wants.
func TestSession_ClosedEarly(t *testing.T) {
	dir := t.TempDir()
	memory := memoryFile(t, dir)
	testenv.NoLeaks(t, dir)
	s := uffd.NewServer(nil)
	// Before anybody connects.
	session, err := s.Listen(uffd.Options{Memory: memory, Socket: filepath.Join(dir, "s")})
	must(t, err)
	must(t, session.Close())
	if _, err := os.Lstat(filepath.Join(dir, "s")); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	// Before anything is sent.
	session, vm, a := serve(t, s, uffd.Options{Memory: memory, Socket: filepath.Join(dir, "s")}, "silent")
	vm.want("connected")
	must(t, session.Close())
	vm.awaitEnd()
	a.silent(t)
	must(t, s.Close())
}

func TestListen_Refused(t *testing.T) {
	dir := t.TempDir()
	memory := memoryFile(t, dir)
	s := newServer(t)
	must(t, os.Symlink(memory, filepath.Join(dir, "link")))
	must(t, os.WriteFile(filepath.Join(dir, "empty"), nil, 0o600))
	for name, o := range map[string]uffd.Options{
		"NoMemory":   {Memory: filepath.Join(dir, "none"), Socket: filepath.Join(dir, "s")},
		"Link":       {Memory: filepath.Join(dir, "link"), Socket: filepath.Join(dir, "s")},
		"Empty":      {Memory: filepath.Join(dir, "empty"), Socket: filepath.Join(dir, "s")},
		"Device":     {Memory: "/dev/zero", Socket: filepath.Join(dir, "s")},
		"NoDir":      {Memory: memory, Socket: filepath.Join(dir, "none", "s")},
		"SocketDone": {Memory: memory, Socket: memory},
	} {
		if _, err := s.Listen(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if len(s.Sessions()) > 0 {
		t.Error("there are sessions")
	}
	// A path that is too long for an address.
	long := filepath.Join(dir, strings.Repeat("d", 100))
	must(t, os.Mkdir(long, 0o700))
	session, err := s.Listen(uffd.Options{Memory: memory, Socket: filepath.Join(long, "s")})
	must(t, err)
	if fi, err := os.Lstat(filepath.Join(long, "s")); err != nil || fi.Mode().Type() != os.ModeSocket {
		t.Errorf("%v, %v", fi, err)
	}
	must(t, session.Close())
}

// The file becomes shorter under a VM: it is killed, and the alarm says why.
func TestSession_MemoryTruncated(t *testing.T) {
	s := newServer(t)
	memory := memoryFile(t, t.TempDir())
	session, vm, a := serve(t, s, uffd.Options{Memory: memory})
	vm.want("connected")
	vm.ask(content(0), "read 0")
	must(t, os.Truncate(memory, 10*page))
	vm.tell("read 400")
	err := a.await(t)
	if err == nil || !strings.Contains(err.Error(), "memory file") {
		t.Errorf("alarm: %v", err)
	}
	vm.awaitEnd()
	await(t, "the session's end", session.Done())
}

// The handler is killed, and the VM is too: by the kernel, as there is nobody else.
func TestHandlerKilled(t *testing.T) {
	requireUFFD(t)
	dir := t.TempDir()
	memory, socket := memoryFile(t, dir), filepath.Join(dir, "s")
	h := startChild(t, "handler", socket, memory)
	h.want("listening")
	vm := startChild(t, "vmm", socket, fmt.Sprint(testPages*page))
	vm.want("connected")
	vm.ask(content(0), "read 0")
	must(t, h.cmd.Process.Kill())
	vm.awaitEnd()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
