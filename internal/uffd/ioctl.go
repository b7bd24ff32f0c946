package uffd

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/userfaultfd.h.
const (
	eventPagefault = 0x12
	eventRemove    = 0x15
	eventSize      = 32 // bytes of struct uffd_msg

	ioctlWake     = 2<<30 | 16<<16 | 0xaa<<8 | 2 // _IOR: struct uffdio_range
	ioctlCopy     = 3<<30 | 40<<16 | 0xaa<<8 | 3 // _IOWR: struct uffdio_copy
	ioctlZeropage = 3<<30 | 32<<16 | 0xaa<<8 | 4 // _IOWR: struct uffdio_zeropage
)

// event is what a VM's userfaultfd tells: a fault at start, or start to end removed.
type event struct {
	kind       uint8
	start, end uint64
}

func parseEvent(b []byte) event {
	e := event{kind: b[0], start: binary.NativeEndian.Uint64(b[8:]), end: binary.NativeEndian.Uint64(b[16:])}
	if e.kind == eventPagefault {
		e.start = e.end // after its flags
	}
	return e
}

// copyPages fills missing pages. Done is how many bytes came to be there, also where it fails;
// EAGAIN without any is that an event of removal waits to be read.
func copyPages(fd int, dst, src, n uint64) (done uint64, err error) {
	arg := struct {
		dst, src, n, mode uint64
		done              int64
	}{dst: dst, src: src, n: n}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlCopy, uintptr(unsafe.Pointer(&arg)))
	return uint64(max(0, arg.done)), errorOf(errno)
}

// zeroPages fills missing pages with zeros. Those of hugetlbfs it cannot: EINVAL.
func zeroPages(fd int, dst, n uint64) error {
	arg := struct {
		dst, n, mode uint64
		done         int64
	}{dst: dst, n: n}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlZeropage, uintptr(unsafe.Pointer(&arg)))
	return errorOf(errno)
}

// wake lets threads go on that wait for pages which are there.
func wake(fd int, dst, n uint64) error {
	arg := struct{ dst, n uint64 }{dst, n}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlWake, uintptr(unsafe.Pointer(&arg)))
	return errorOf(errno)
}

func errorOf(errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}
