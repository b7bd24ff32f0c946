package supervise

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/logfile"
	"push.rocks/smartvm/internal/store"
)

const (
	maxMessage = 256 << 10       // of a message, in bytes
	endTimeout = 5 * time.Second // for a process that is told to give up, before it is killed
)

// Spawn starts a process for c that outlives this one, and returns when its VM runs. Program is
// this program. The error is what went wrong in that process, as a *Failure, or that there is none.
// When ctx ends first, the process gives up its start, or stops the VM that it has just started.
func (c Config) Spawn(ctx context.Context, program string) error {
	c.ready = true
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	defer r.Close()
	cmd := &exec.Cmd{
		Path: program, Args: append([]string{"smartvm"}, c.Args()...), Dir: "/", Env: []string{},
		ExtraFiles: []*os.File{w}, SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if c.Secrets != nil {
		data, err := json.Marshal(c.Secrets)
		if err != nil {
			return errors.Join(fmt.Errorf("start supervisor: %w", err), w.Close())
		}
		cmd.Stdin = bytes.NewReader(data)
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	stop := context.AfterFunc(ctx, func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = r.SetReadDeadline(time.Now().Add(endTimeout))
	})
	defer stop()
	var msg message
	err = json.NewDecoder(io.LimitReader(r, maxMessage)).Decode(&msg)
	if c.Warnings != nil {
		for _, line := range msg.Warnings {
			fmt.Fprintln(c.Warnings, line)
		}
	}
	if err == nil && msg.Error == nil {
		go func() { _ = cmd.Wait() }() // so that it does not stay as a zombie, whenever it ends
		if !stop() {                   // it has been told to give up, and stops the VM
			return context.Cause(ctx)
		}
		return nil
	}
	if err == nil {
		err = msg.Error
	} else {
		err = c.died(cmd, err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // reaps it; what it has to say is said
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// died says what is known about a process that gave no word.
func (c *Config) died(cmd *exec.Cmd, err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		_ = cmd.Wait()
		err = errors.New(cmd.ProcessState.String())
	}
	log := logfile.Tail(filepath.Join(c.RuntimeDir, c.ID, store.SuperviseLog), 1<<10)
	if log != "" {
		log = "\nits log:\n  " + strings.ReplaceAll(strings.TrimSpace(log), "\n", "\n  ")
	}
	return fmt.Errorf("VM %s: its supervisor ended: %w%s", c.ID, err, log)
}
