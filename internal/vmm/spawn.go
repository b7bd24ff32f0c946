package vmm

import (
	"math"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/osthread"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network/netns"
)

// spawn starts cmd in the VMM's control group, and among binds where there are any.
func (p *Process) spawn(cmd *exec.Cmd, binds []stage.Bind) (*os.Process, error) {
	if p.Cgroup != "" {
		dir, err := os.Open(p.Cgroup)
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(dir.Fd())
	}
	if p.cfg.Jailer == nil {
		return startAlone(p.cfg.NetNS, cmd)
	}
	// The jailer closes by itself what it inherits.
	if err := startJailed(cmd, filepath.Join(p.Dir, store.JailDir), binds); err != nil {
		return nil, err
	}
	return cmd.Process, nil
}

// startAlone starts cmd in a network namespace, this process's for "", with none of the descriptors
// that this process has inherited or opened so that its children inherit them: that is the
// program's business, but they are not for the VMM. It forks from a thread with a copy of the table
// of descriptors, in which all are closed by exec. Linux < 5.11 cannot do that.
func startAlone(path string, cmd *exec.Cmd) (*os.Process, error) {
	var pid int
	start := func() error {
		_ = unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_UNSHARE|unix.CLOSE_RANGE_CLOEXEC)
		if err := cmd.Start(); err != nil {
			return err
		}
		pid = cmd.Process.Pid
		return cmd.Process.Release() // its descriptor is in the copy
	}
	do := osthread.Do
	if path != "" {
		ns, err := netns.Open(path)
		if err != nil {
			return nil, err
		}
		defer ns.Close()
		do = ns.Do
	}
	if err := do(start); err != nil {
		return nil, err
	}
	return os.FindProcess(pid) // it is ours until it is waited for
}
