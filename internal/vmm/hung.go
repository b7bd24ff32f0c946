package vmm

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

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
