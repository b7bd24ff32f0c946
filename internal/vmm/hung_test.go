package vmm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/vmm"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == standVerb {
		standStill(os.Args[2])
	}
	m.Run()
}

// standVerb makes this program one whose threads wait for each other.
const standVerb = "stand-still"

// How such a program stands.
const (
	withVM    = "with-vm"    // it has a VM of KVM's
	withoutVM = "without-vm" // as before its instance is started
	waking    = "waking"     // with a VM, and one of its threads goes on now and then
)

// standStill does not return. It opens nothing that the runtime would wait for by a thread of its
// own.
func standStill(how string) {
	if how != withoutVM {
		kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			os.Exit(3)
		}
		const createVM = 0xae01 // Documentation/virt/kvm/api.rst, KVM_CREATE_VM
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(kvm), createVM, 0); errno != 0 {
			os.Exit(4)
		}
	}
	wait := func(timeout *unix.Timespec) {
		runtime.LockOSThread()
		for word := new(uint32); ; {
			_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(word)), 0, 0, uintptr(unsafe.Pointer(timeout)), 0, 0)
		}
	}
	var timeout *unix.Timespec
	if how == waking {
		timeout = &unix.Timespec{Nsec: 5_000_000}
	}
	go wait(timeout)
	_, _ = unix.Write(1, []byte("up\n"))
	wait(nil)
}

// A VMM is said to hang if its instance was started and none of its threads goes on between two
// looks.
func TestProcess_Hung(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	program := testenv.PlainBinary(t) // the race detector's has a thread that wakes
	stand := func(t *testing.T, how string) *stand {
		s := newStand(t, fmt.Sprintf("exec '%s' %s %s\n", program, standVerb, how))
		s.start(t)
		s.up(t)
		return s
	}
	// eventually waits: what the runtime has begun may take a moment.
	eventually := func(t *testing.T, what string, is func() bool) {
		t.Helper()
		within(t, what, func() {
			for tick := time.Tick(time.Millisecond); !is(); <-tick {
			}
		})
	}
	t.Run(withVM, func(t *testing.T) {
		s := stand(t, withVM)
		eventually(t, "it is hung", func() bool { return s.Hung(t.Context()) })
		if s.Hung(gone(t)) {
			t.Error("it is said to be hung after one look")
		}
		// Of a VMM that takes no notice of its signal the end is not waited for.
		group, signalled := immortal(t)
		pids, err := s.PIDs()
		if err == nil {
			err = os.WriteFile(filepath.Join(group, "cgroup.procs"), fmt.Appendln(nil, pids[0]), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		stop := vmm.Attach(t.TempDir(), group).EndIfHung(t.Context())
		eventually(t, "it is signalled", signalled)
		within(t, "the end of the call", stop)
		stop = s.EndIfHung(t.Context())
		defer stop()
		within(t, "the end of a VMM that hangs", func() { <-s.Done() })
	})
	t.Run(withoutVM, func(t *testing.T) {
		s := stand(t, withoutVM)
		pids, err := s.PIDs()
		if err != nil || len(pids) != 1 {
			t.Fatalf("processes %v, %v", pids, err)
		}
		eventually(t, "all its threads wait", func() bool {
			_, ok := vmm.Waiting(fmt.Sprintf("/proc/%d/task", pids[0]))
			return ok
		})
		if vmm.Standstill(s.Process) != "" || s.Hung(t.Context()) {
			t.Error("it has started no instance")
		}
	})
	t.Run(waking, func(t *testing.T) {
		s := stand(t, waking)
		for range 5 {
			eventually(t, "it seems to be hung", func() bool { return vmm.Standstill(s.Process) != "" })
			if s.Hung(t.Context()) {
				t.Fatal("a thread of it goes on")
			}
		}
	})
}
