package vmm

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Hung says whether the guest has ended and the VMM never will: when a guest ends while a request is served,
// Firecracker's main thread may wait for the API's thread, and that one for an answer (seen in 1.12.1). Such a VMM
// has no vCPU threads, and all it has wait for each other. It can only be killed.
func (p *Process) Hung() bool {
	pids, err := p.PIDs()
	if err != nil {
		return false
	}
	for _, pid := range pids {
		dir := filepath.Join("/proc", strconv.Itoa(pid))
		if _, err := os.Readlink(filepath.Join(dir, "exe")); err == nil && !deadlocked(filepath.Join(dir, "task")) {
			return false
		}
	}
	return len(pids) > 0
}

func deadlocked(tasks string) bool {
	entries, err := os.ReadDir(tasks)
	if err != nil || len(entries) < 2 {
		return false
	}
	for _, e := range entries {
		comm, err1 := os.ReadFile(filepath.Join(tasks, e.Name(), "comm"))
		if strings.HasPrefix(string(comm), "kvm-") {
			continue // the kernel's own
		}
		syscall, err2 := os.ReadFile(filepath.Join(tasks, e.Name(), "syscall"))
		number, _, _ := strings.Cut(string(syscall), " ")
		if err1 != nil || err2 != nil || strings.HasPrefix(string(comm), "fc_vcpu") || number != strconv.Itoa(unix.SYS_FUTEX) {
			return false
		}
	}
	return true
}

// hungLook is how often EndIfHung looks.
const hungLook = time.Second

// EndIfHung kills a VMM that hangs, which would otherwise never answer, until the function it returns is called.
func (p *Process) EndIfHung() (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(hungLook)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				if p.Hung() {
					_ = p.Revert(context.Background()) // has a time limit: the kernel's
				}
			}
		}
	})
	return func() { close(done); wg.Wait() }
}
