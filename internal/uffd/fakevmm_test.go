package uffd_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/uffd"
)

// The test program is a VMM with its guest, or a handler, if it is told to.
const (
	childVariable = "SMARTVM_TEST_UFFD"
	childArgs     = "SMARTVM_TEST_UFFD_ARGS"
)

func TestMain(m *testing.M) {
	args := strings.Split(os.Getenv(childArgs), "\n")
	var err error
	switch os.Getenv(childVariable) {
	case "":
		os.Exit(m.Run())
	case "vmm":
		err = fakeVMM(args)
	case "handler":
		err = handler(args)
	}
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// handler serves one VM until it is killed.
func handler(args []string) error {
	server := uffd.NewServer(nil)
	if _, err := server.Listen(uffd.Options{Socket: args[0], Memory: args[1]}); err != nil {
		return err
	}
	fmt.Println("listening")
	select {}
}

const page = 4096

// fakeVMM has memory of the size args[1] in two regions, connects to args[0], and does what its
// input says, a line each:
//
//	read PAGE      answers with the page's first bytes as text
//	write PAGE     writes to it
//	drop PAGE N    gives pages back, as a balloon does
//	dropread PAGE N  gives pages back, and while that waits another thread reads the first: what it finds
//
// A third argument is a misdeed of which it is capable.
func fakeVMM(args []string) error {
	var size int
	if _, err := fmt.Sscan(args[1], &size); err != nil {
		return err
	}
	misdeed := ""
	if len(args) > 2 {
		misdeed = args[2]
	}
	flags := unix.MAP_PRIVATE | unix.MAP_ANON
	if misdeed == "huge" { // none: its pages are of 2 MiB
		flags |= unix.MAP_HUGETLB
	}
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return err
	}
	fd, err := newUserfaultfd(memory)
	if err != nil {
		return err
	}
	conn, err := net.Dial("unix", args[0])
	if err != nil {
		return err
	}
	if err := greet(conn.(*net.UnixConn), fd, memory, misdeed); err != nil {
		return err
	}
	fmt.Println("connected")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var what string
		var first, n int
		_, _ = fmt.Sscan(lines.Text(), &what, &first, &n)
		pages := memory[first*page : (first+n)*page]
		switch what {
		case "read":
			fmt.Println(text(memory[first*page:]))
		case "write":
			memory[first*page] = 'w'
			fmt.Println("written")
		case "drop":
			fmt.Println("dropped", unix.Madvise(pages, unix.MADV_DONTNEED))
		case "dropread":
			done := make(chan error)
			go func() { done <- unix.Madvise(pages, unix.MADV_DONTNEED) }()
			read := text(memory[(first+n-1)*page:]) // before or after it
			fmt.Println("dropped", <-done, read)
		}
	}
	return lines.Err()
}

func text(b []byte) string {
	text, _, _ := strings.Cut(string(b[:20]), "\x00")
	return text
}

func greet(conn *net.UnixConn, fd int, memory []byte, misdeed string) error {
	base := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory))))
	size := uint64(page)
	if misdeed == "huge" {
		size = 2 << 20
	}
	half := uint64(len(memory)) / 2 / size * size
	// The regions are in the file in another order than in memory.
	other := uint64(len(memory)) - half
	regions := []map[string]uint64{
		{"base_host_virt_addr": base, "size": half, "offset": other, "page_size": size, "page_size_kib": size},
		{"base_host_virt_addr": base + half, "size": other, "offset": 0, "page_size": size, "page_size_kib": size},
	}
	fds := []int{fd}
	data, err := json.Marshal(regions)
	if err != nil {
		return err
	}
	switch misdeed {
	case "silent":
		return nil
	case "noJSON":
		data = []byte("hello")
	case "noFD":
		fds = nil
	case "twoFDs":
		fds = append(fds, 0)
	case "manyFDs":
		for range 20 {
			fds = append(fds, 0)
		}
	case "otherFD":
		fds = []int{0}
	case "endless":
		data = []byte(strings.Repeat("[", 100<<10))
	case "slow": // no misdeed: the message comes in parts
		for i := range data[1:] {
			if _, err := conn.Write(data[i : i+1]); err != nil {
				return err
			}
		}
		data = data[len(data)-1:]
	case "small":
		regions[1]["size"] -= page
		data, err = json.Marshal(regions)
	}
	if err != nil {
		return err
	}
	if fds == nil {
		_, err = conn.Write(data)
	} else {
		_, _, err = conn.WriteMsgUnix(data, unix.UnixRights(fds...), nil)
	}
	// As Firecracker does, it keeps the connection.
	return err
}

// newUserfaultfd registers memory for faults on what is missing.
func newUserfaultfd(memory []byte) (int, error) {
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK
	dev, err := unix.Open("/dev/userfaultfd", unix.O_RDWR|unix.O_CLOEXEC, 0)
	var fd uintptr
	var errno unix.Errno
	if err == nil {
		fd, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(dev), 0xaa00, flags) // USERFAULTFD_IOC_NEW
		_ = unix.Close(dev)
	} else {
		fd, _, errno = unix.Syscall(unix.SYS_USERFAULTFD, flags|1, 0, 0) // UFFD_USER_MODE_ONLY
	}
	if errno != 0 {
		return -1, errno
	}
	api := struct{ api, features, ioctls uint64 }{0xaa, 1 << 3, 0} // EVENT_REMOVE
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, 0xc018aa3f, uintptr(unsafe.Pointer(&api))); errno != 0 {
		return -1, errno
	}
	register := struct{ start, n, mode, ioctls uint64 }{
		uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory)))),
		uint64(len(memory)), 1, 0,
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, 0xc020aa00, uintptr(unsafe.Pointer(&register))); errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// requireUFFD skips the test where there is no userfaultfd for us.
func requireUFFD(t testing.TB) {
	t.Helper()
	memory, err := unix.Mmap(-1, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := newUserfaultfd(memory)
	if err != nil {
		t.Skipf("userfaultfd: %v", err)
	}
	if err := errors.Join(unix.Close(fd), unix.Munmap(memory)); err != nil {
		t.Fatal(err)
	}
}

// vmm is a fakeVMM.
type vmm struct {
	t       testing.TB
	cmd     *exec.Cmd
	in      io.Writer
	answers chan string
	ended   chan struct{}
}

// patience is reached only when something hangs.
const patience = 30 * time.Second

func startChild(t testing.TB, what string, args ...string) *vmm {
	t.Helper()
	return startAs(t, 0, what, args...)
}

// startAs starts a child as another user, if uid is not 0. Its first argument is a socket.
func startAs(t testing.TB, uid int, what string, args ...string) *vmm {
	t.Helper()
	program, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	dir, err := os.Open(filepath.Dir(args[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	args = append([]string{"/proc/self/fd/4/" + filepath.Base(args[0])}, args[1:]...)
	cmd := exec.Command("/proc/self/fd/3")    //nolint:noctx // killed below
	cmd.ExtraFiles = []*os.File{program, dir} // what is above them may be closed to others, or too long for a socket
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	cmd.Env = append(os.Environ(), childVariable+"="+what, childArgs+"="+strings.Join(args, "\n"),
		"GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	in, ierr := cmd.StdinPipe()
	out, oerr := cmd.StdoutPipe()
	if err := errors.Join(ierr, oerr, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	v := &vmm{t: t, cmd: cmd, in: in, answers: make(chan string, 1000), ended: make(chan struct{})}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			v.answers <- lines.Text()
		}
		_ = cmd.Wait()
		close(v.ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		v.awaitEnd()
	})
	return v
}

// ask sends a command and wants an answer.
func (v *vmm) ask(want, format string, args ...any) {
	v.t.Helper()
	v.tell(format, args...)
	v.want(want)
}

func (v *vmm) tell(format string, args ...any) {
	v.t.Helper()
	if _, err := fmt.Fprintf(v.in, format+"\n", args...); err != nil {
		v.t.Fatal(err)
	}
}

func (v *vmm) want(want string) {
	v.t.Helper()
	if got := v.answer(); got != want {
		v.t.Fatalf("the VM answers %q, want %q", got, want)
	}
}

func (v *vmm) answer() string {
	v.t.Helper()
	select {
	case got := <-v.answers:
		return got
	case <-v.ended:
		v.t.Fatal("the VMM has ended")
	case <-time.After(patience):
		v.t.Fatal("the VM hangs")
	}
	return ""
}

func (v *vmm) awaitEnd() {
	v.t.Helper()
	select {
	case <-v.ended:
	case <-time.After(patience):
		v.t.Fatal("the VMM did not end")
	}
}
