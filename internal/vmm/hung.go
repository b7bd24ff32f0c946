package vmm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// hungPause is the time between the two looks of Hung.
const hungPause = 100 * time.Millisecond

// Hung says whether the guest has ended and the VMM never will: when a guest ends while a request
// is served, Firecracker's main thread may wait for the API's thread, and that one for an answer
// (seen in 1.12.1). Such a VMM has a VM but no vCPU threads, and all threads that it has wait for
// each other. It can only be killed. One look reads the threads one after the other, so there are
// two, between which none of them has run.
func (p *Process) Hung(ctx context.Context) bool {
	was := p.standstill()
	if was == "" {
		return false
	}
	timer := time.NewTimer(hungPause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return p.standstill() == was
	}
}

// standstill describes a VMM that seems to hang: the same again tells that nothing in it has run.
// It is empty for any other.
func (p *Process) standstill() string {
	pids, err := p.PIDs()
	if err != nil {
		return ""
	}
	var all strings.Builder
	for _, pid := range pids {
		dir := filepath.Join("/proc", strconv.Itoa(pid))
		if _, err := os.Readlink(filepath.Join(dir, "exe")); err != nil {
			continue // it has ended
		}
		waits, ok := waiting(filepath.Join(dir, "task"))
		if !ok || !hasVM(filepath.Join(dir, "fd")) {
			return ""
		}
		fmt.Fprintf(&all, "%d: %s\n", pid, waits)
	}
	return all.String()
}

// hasVM says whether a process has a VM of KVM's, that is, whether its instance has been started.
func hasVM(descriptors string) bool {
	entries, err := os.ReadDir(descriptors)
	return err == nil && slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		to, err := os.Readlink(filepath.Join(descriptors, e.Name()))
		return err == nil && to == "anon_inode:kvm-vm"
	})
}

// waiting describes for what the threads of a process wait, and how often each has run; it is false
// unless there are two at least, none a vCPU's, and all wait for others.
func waiting(tasks string) (waits string, ok bool) {
	entries, err := os.ReadDir(tasks)
	if err != nil || len(entries) < 2 {
		return "", false
	}
	var all strings.Builder
	for _, e := range entries {
		read := func(name string) string {
			text, _ := os.ReadFile(filepath.Join(tasks, e.Name(), name)) // nothing is neither of the kernel nor in a system call
			return string(text)
		}
		comm := read("comm")
		if strings.HasPrefix(comm, "kvm-") {
			continue // the kernel's own
		}
		syscall := read("syscall")
		number, _, _ := strings.Cut(syscall, " ")
		if comm == "" || strings.HasPrefix(comm, "fc_vcpu") || number != strconv.Itoa(unix.SYS_FUTEX) {
			return "", false
		}
		_, switches, _ := strings.Cut(read("status"), "voluntary_ctxt_switches:")
		fmt.Fprintln(&all, e.Name(), syscall, switches)
	}
	return all.String(), true
}

// hungLook is how often EndIfHung looks.
const hungLook = time.Second

// EndIfHung kills a VMM that hangs, which would otherwise never answer, until the function that it
// returns is called or ctx ends.
func (p *Process) EndIfHung(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(hungLook)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if p.Hung(ctx) {
					_ = p.signal() // a process that waits for an answer sees the end of the VMM
				}
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}
