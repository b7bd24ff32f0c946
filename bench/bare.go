package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"push.rocks/smartvm/firecracker"
)

// bare is Firecracker without anybody's help: one process, one configuration file.
type bare struct {
	cmd  *exec.Cmd
	out  *os.File
	dir  string
	took time.Duration // from spawn to the guest's first byte
}

// startBare starts a VM with the kernel and the drives at these paths, and waits for the guest's
// first byte.
func (b *bench) startBare(ctx context.Context, name, kernel string, drives ...string) (*bare, error) {
	v := &bare{dir: filepath.Join(b.Dir, name)}
	if err := os.Mkdir(v.dir, 0o700); err != nil {
		return nil, err
	}
	list := []firecracker.Drive{}
	for i, path := range drives {
		list = append(list, firecracker.Drive{DriveID: fmt.Sprintf("data%d", i), PathOnHost: path})
	}
	config, err := json.Marshal(firecracker.FullVMConfiguration{
		BootSource:    &firecracker.BootSource{KernelImagePath: kernel},
		MachineConfig: &firecracker.MachineConfiguration{VCPUCount: 1, MemSizeMiB: 128},
		Drives:        list,
	})
	if err != nil {
		return nil, err
	}
	path, log := filepath.Join(v.dir, "config"), filepath.Join(v.dir, "log")
	if err := errors.Join(os.WriteFile(path, config, 0o600), os.WriteFile(log, nil, 0o600)); err != nil {
		return nil, err
	}
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	v.out = read
	v.cmd = exec.CommandContext(ctx, b.Firecracker, "--no-api", "--config-file", path, "--log-path", log,
		"--level", "Error")
	v.cmd.Stdout, v.cmd.Dir = write, v.dir
	begun := time.Now()
	err = errors.Join(v.cmd.Start(), write.Close())
	if err == nil {
		err = await(read)
	}
	v.took = time.Since(begun)
	if err != nil {
		text, _ := os.ReadFile(log)
		return nil, errors.Join(fmt.Errorf("bare Firecracker: %w: %s", err, text), v.stop())
	}
	return v, nil
}

// guestTimeout bounds how long a guest's first byte may take.
const guestTimeout = 10 * time.Second

// await reads until the guest's first byte.
func await(f *os.File) error {
	if err := f.SetReadDeadline(time.Now().Add(guestTimeout)); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	for {
		n, err := f.Read(buf)
		if bytes.Contains(buf[:n], []byte(mark)) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("wait for the guest: %w", err)
		}
	}
}

func (v *bare) stop() error {
	if v.cmd.Process != nil {
		_ = v.cmd.Process.Kill()
		_ = v.cmd.Wait()
	}
	return errors.Join(v.out.Close(), os.RemoveAll(v.dir))
}

// runBare runs a guest that reboots at once, as a whole process.
func (b *bench) runBare(ctx context.Context) (time.Duration, error) {
	begun := time.Now()
	v, err := b.startBare(ctx, "bare-run", b.reboot)
	if err != nil {
		return 0, err
	}
	err = v.cmd.Wait()
	took := time.Since(begun)
	return took, errors.Join(err, v.out.Close(), os.RemoveAll(v.dir))
}

// calibrationStarts are bare starts whose mean is the machine's pace.
const calibrationStarts = 20

func (b *bench) calibrate(ctx context.Context) error {
	var sum time.Duration
	for round := range warmup + calibrationStarts {
		v, err := b.startBare(ctx, "bare", b.idle, b.drive)
		if err != nil {
			return err
		}
		if round >= warmup {
			sum += v.took
		}
		if err := v.stop(); err != nil {
			return err
		}
	}
	b.samples.add(paceSample, "s", (sum / calibrationStarts).Seconds())
	return nil
}

// calibrateLab runs in the lab, as soon as that is up.
func (b *bench) calibrateLab(context.Context) error {
	text, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return err
	}
	var up float64
	_, err = fmt.Sscan(string(text), &up)
	b.samples.add(paceSample, "s", up)
	return err
}
