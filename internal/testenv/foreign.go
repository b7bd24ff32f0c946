package testenv

import (
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// ForeignExits says whether the kernel tells how processes have ended to others than their parents
// (Linux >= 6.15).
func ForeignExits(t testing.TB) bool {
	t.Helper()
	child := exec.Command("sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(child.Process.Pid, 0)
	_ = child.Process.Kill()
	_ = child.Wait()
	if err != nil {
		t.Log(err)
		return false
	}
	defer unix.Close(fd)
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	err = unix.IoctlPidfdInfo(fd, &info)
	return err == nil && info.Mask&unix.PIDFD_INFO_EXIT != 0
}
