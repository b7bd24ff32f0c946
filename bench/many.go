package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/tinyguest"
)

// Many VMs on one host: so many run, a few VMMs are stopped and continued, and the supervisor of
// some is killed with their VMMs.
const (
	manyVMs    = 500
	manyKilled = 200
	manySilent = 5
	manyTimes  = 5
)

// forkMany is how many VMs one call of Fork makes, forkManyTimes how often.
const (
	forkMany      = 100
	forkManyTimes = 5
)

// many measures commands and calls on a host with many VMs, which processes of their own supervise.
func (b *bench) many(ctx context.Context) (err error) {
	h, err := b.host(smartvm.LaunchDirect)
	if err != nil {
		return err
	}
	defer h.Close()
	b.samples.counting = false
	sn, done, err := b.template(ctx, h, tinyguest.Idle)
	if err != nil {
		return err
	}
	b.samples.counting = true
	defer func() { err = errors.Join(err, done()) }()
	killed, err := b.supervise(ctx, sn.ID, manyKilled)
	if err != nil {
		return err
	}
	defer killed.kill()
	others, err := b.supervise(ctx, sn.ID, manyVMs-manyKilled)
	if err != nil {
		return err
	}
	defer others.kill()
	for range manyTimes {
		if err := b.openMany(ctx); err != nil {
			return err
		}
	}
	if err := b.psMany(ctx, "ps-500-all-answer"); err != nil {
		return err
	}
	resume, err := others.stopVMMs(manySilent)
	if err == nil {
		err = b.psMany(ctx, "ps-500")
	}
	if err := errors.Join(err, resume()); err != nil {
		return err
	}
	if err := b.recoverMany(ctx, killed); err != nil {
		return err
	}
	return others.end()
}

// manyHost is a host with the runtime directory that b's commands use.
func (b *bench) manyHost() (*smartvm.Host, error) {
	return smartvm.Open(smartvm.Options{
		RuntimeDir: b.cliDir(), DataDir: b.dataDir(), Launcher: smartvm.LaunchDirect,
		FirecrackerBinary: b.Firecracker, JailerBinary: b.Jailer,
	})
}

func (b *bench) openMany(ctx context.Context) error {
	begun := time.Now()
	h, err := b.manyHost()
	if err != nil {
		return err
	}
	b.samples.time("open-500", time.Since(begun))
	all, err := h.Machines(ctx)
	if err == nil && len(all) != manyVMs {
		err = fmt.Errorf("%d VMs, want %d", len(all), manyVMs)
	}
	return errors.Join(err, h.Close())
}

// psMany measures whole processes of `smartvm ps`.
func (b *bench) psMany(ctx context.Context, name string) error {
	for range manyTimes {
		cmd := b.command(ctx, "ps")
		begun := time.Now()
		out, err := cmd.Output()
		b.samples.time(name, time.Since(begun))
		if err != nil {
			return fmt.Errorf("smartvm ps: %w: %s", err, out)
		}
		if listed := bytes.Count(out, []byte("\n")) - 1; listed != manyVMs { // below the header
			return fmt.Errorf("smartvm ps lists %d VMs, want %d", listed, manyVMs)
		}
	}
	return nil
}

// recoverMany kills a supervisor and all its VMMs, beside others that go on, and recovers.
func (b *bench) recoverMany(ctx context.Context, s *supervisor) error {
	s.kill()
	if err := killAll(s.pids); err != nil {
		return err
	}
	h, err := b.manyHost()
	if err != nil {
		return err
	}
	defer h.Close()
	begun := time.Now()
	report, err := h.Recover(ctx)
	b.samples.add("recover-200", "s", time.Since(begun).Seconds())
	if err == nil && len(report.Recovered) != manyKilled {
		err = fmt.Errorf("%d VMs were recovered, want %d", len(report.Recovered), manyKilled)
	}
	return err
}

// killAll kills processes and returns when all have ended.
func killAll(pids []int) error {
	var dying []unix.PollFd
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
			return err
		}
		dying = append(dying, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	for deadline := time.Now().Add(guestTimeout); len(dying) > 0; {
		if _, err := unix.Poll(dying[:1], int(time.Until(deadline).Milliseconds())); err != nil && err != unix.EINTR {
			return err
		}
		switch {
		case dying[0].Revents != 0:
			dying = dying[1:]
		case time.Now().After(deadline):
			return errors.New("a killed VMM does not end")
		}
	}
	return nil
}

// supervisor is a process that supervises VMs of its own.
type supervisor struct {
	cmd  *exec.Cmd
	in   io.Closer // at its end the process ends its VMs
	pids []int     // of their VMMs
}

// superviseVerb is the first argument of such a process. Its bench in JSON, a snapshot and the
// number of VMs follow.
const superviseVerb = "supervise-forks"

// supervise starts a process that forks a snapshot, and returns when all VMs run.
func (b *bench) supervise(ctx context.Context, snapshot string, n int) (*supervisor, error) {
	arguments, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := &supervisor{cmd: exec.CommandContext(ctx, self, superviseVerb, string(arguments), snapshot, fmt.Sprint(n))}
	interruptible(s.cmd)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	runtime.LockOSThread() // Pdeathsig means the thread
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &s.pids)
	}
	if err == nil && len(s.pids) != n {
		err = fmt.Errorf("%d VMMs, want %d", len(s.pids), n)
	}
	if err != nil {
		s.kill()
		return nil, fmt.Errorf("supervise %d VMs: %w", n, err)
	}
	return s, nil
}

// runSupervisor is such a process. It prints the PIDs of its VMMs.
func runSupervisor(ctx context.Context, arguments, snapshot, count string) error {
	b, n := &bench{}, 0
	if err := json.Unmarshal([]byte(arguments), b); err != nil {
		return err
	}
	if _, err := fmt.Sscan(count, &n); err != nil {
		return err
	}
	h, err := b.manyHost()
	if err != nil {
		return err
	}
	defer h.Close()
	sn, err := h.Snapshot(snapshot)
	if err != nil {
		return err
	}
	all, err := sn.Fork(ctx, n, smartvm.ForkOptions{Concurrency: loopConcurrency})
	if err != nil {
		return err
	}
	var pids []int
	for _, m := range all {
		in, err := m.Inspect(ctx)
		if err != nil {
			return err
		}
		pids = append(pids, in.PIDs...)
	}
	if err := json.NewEncoder(os.Stdout).Encode(pids); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	return removeAll(ctx, all)
}

// stopVMMs stops n VMMs, so that they do not answer, until the function that it returns is called.
func (s *supervisor) stopVMMs(n int) (resume func() error, err error) {
	var stopped []int
	for i := range n {
		pid := s.pids[i*len(s.pids)/n]
		err = errors.Join(err, unix.Kill(pid, unix.SIGSTOP))
		stopped = append(stopped, pid)
	}
	return func() (err error) {
		for _, pid := range stopped {
			err = errors.Join(err, unix.Kill(pid, unix.SIGCONT))
		}
		return err
	}, err
}

// end has the process end its VMs.
func (s *supervisor) end() error { return errors.Join(s.in.Close(), s.cmd.Wait()) }

// kill kills the process and leaves its VMs running. Killing again is allowed.
func (s *supervisor) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// forkAtOnce measures one call of Fork until all of its VMs run, and how long as many bare loads
// take, as many at a time.
func (b *bench) forkAtOnce(ctx context.Context, sn *smartvm.Snapshot) error {
	b.samples.counting = true
	for range forkManyTimes {
		begun := time.Now()
		all, err := sn.Fork(ctx, forkMany, smartvm.ForkOptions{Concurrency: loopConcurrency})
		if err != nil {
			return err
		}
		ours := time.Since(begun)
		if err := removeAll(ctx, all); err != nil {
			return err
		}
		rate, err := b.forkBare(ctx, sn, forkMany)
		if err != nil {
			return err
		}
		bare := time.Duration(forkMany / rate * float64(time.Second))
		b.samples.time("fork-100", ours)
		b.samples.time("bare-fork-100", bare)
		b.samples.add("fork-100/bare", "times", ours.Seconds()/bare.Seconds())
	}
	return nil
}
