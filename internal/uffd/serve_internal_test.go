package uffd

import (
	"bytes"
	"errors"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A fault is read before the removal that came before it, as the kernel gives them. It has to wait
// for that, and finds zeros. Here the test itself is the guest: it touches memory by system calls
// only, as no goroutine may stop elsewhere.
func TestServing_RemovalPending(t *testing.T) {
	const page, pages = 4096, 8
	guest, err := unix.Mmap(-1, 0, pages*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	must(t, err)
	defer func() { must(t, unix.Munmap(guest)) }()
	base := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(guest))))
	fd := openUserfaultfd(t, base, pages*page)
	s := &Session{
		server: NewServer(nil), memory: &memory{data: bytes.Repeat([]byte("x"), pages*page)},
		ready: make(chan struct{}),
	}
	f, err := userfaultfd(fd)
	must(t, err)
	defer f.Close()
	v := s.newServing(&handshake{fd: fd, file: f, regions: []region{{base: base, size: pages * page}}, pageSize: page},
		false)

	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	dropped, touched := make(chan error), make(chan error)
	go func() { dropped <- unix.Madvise(guest[:2*page], unix.MADV_DONTNEED) }()
	// The removal waits to be read when nothing can be copied any more.
	for {
		if _, err := copyPages(fd, base+7*page, address(s.memory.data), page); errors.Is(err, unix.EAGAIN) {
			break
		}
		must(t, unix.Madvise(guest[7*page:], unix.MADV_NORMAL)) // that takes long enough for another thread
	}
	go func() {
		_, err := unix.Write(int(w.Fd()), guest[:page])
		touched <- err
	}()
	if again, err := v.fault(base); !again || err != nil {
		t.Errorf("with a removal pending: again %v, %v", again, err)
	}
	if n := s.copied.Load(); n != 0 {
		t.Errorf("%d pages were copied", n)
	}
	for done := 0; done < 2; {
		must(t, v.read(false))
		_, err := v.answer()
		must(t, err)
		select {
		case err := <-dropped:
			must(t, err)
			done++
		case err := <-touched:
			must(t, err)
			done++
		case <-time.After(time.Millisecond):
		}
	}
	got := make([]byte, page)
	_, err = r.Read(got)
	must(t, err)
	if !bytes.Equal(got, make([]byte, page)) {
		t.Errorf("the page that was given back begins with %q", got[:8])
	}
	if s.faults.Load() == 0 || s.zeroed.Load() == 0 {
		t.Errorf("%d faults, %d pages of zeros", s.faults.Load(), s.zeroed.Load())
	}
}

// A page that is there already is no error, and whoever waits for it goes on.
func TestServing_ThereAlready(t *testing.T) {
	const page, pages = 4096, 8
	guest, err := unix.Mmap(-1, 0, pages*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	must(t, err)
	defer func() { must(t, unix.Munmap(guest)) }()
	base := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(guest))))
	fd := openUserfaultfd(t, base, pages*page)
	s := &Session{
		server: NewServer(nil), memory: &memory{data: bytes.Repeat([]byte("x"), pages*page)},
		ready: make(chan struct{}),
	}
	f, err := userfaultfd(fd)
	must(t, err)
	defer f.Close()
	v := s.newServing(&handshake{fd: fd, file: f, regions: []region{{base: base, size: pages * page}}, pageSize: page},
		false)
	// Behind its back, pages 2 and 5 come to be there.
	for _, i := range []uint64{2, 5} {
		_, err := copyPages(fd, base+i*page, address(s.memory.data), page)
		must(t, err)
	}
	for _, i := range []uint64{2, 4} {
		if again, err := v.fault(base + i*page); again || err != nil {
			t.Errorf("page %d: again %v, %v", i, again, err)
		}
	}
	if n := s.copied.Load(); n != pages-2 {
		t.Errorf("%d pages were copied, want %d", n, pages-2)
	}
	if again, err := v.fault(base - page); again || err == nil {
		t.Error("a fault outside of the memory was served")
	}
}

func openUserfaultfd(t *testing.T, base, size uint64) int {
	t.Helper()
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		t.Skipf("userfaultfd: %v", errno)
	}
	api := struct{ api, features, ioctls uint64 }{0xaa, 1 << 3, 0} // EVENT_REMOVE
	_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, 0xc018aa3f, uintptr(unsafe.Pointer(&api)))
	if errno == 0 {
		register := struct{ start, n, mode, ioctls uint64 }{base, size, 1, 0}
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, 0xc020aa00, uintptr(unsafe.Pointer(&register)))
	}
	if errno != 0 {
		t.Fatal(errno)
	}
	return int(fd)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
