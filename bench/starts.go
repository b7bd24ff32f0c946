package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	sdk "github.com/firecracker-microvm/firecracker-go-sdk"
	"github.com/firecracker-microvm/firecracker-go-sdk/client/models"
	"github.com/sirupsen/logrus"

	"push.rocks/smartvm"
)

// warmup rounds are not counted.
const warmup = 5

// starts measures from spawn, or the call of Start, to the guest's first byte, each way once a round, in an
// order drawn for each round.
func (b *bench) starts(ctx context.Context) error {
	ways := []func(context.Context) error{
		func(context.Context) error { return b.bareStart() },
		func(ctx context.Context) error { return b.ourStart(ctx, "start", smartvm.LaunchDirect) },
		func(ctx context.Context) error { return b.ourStart(ctx, "start-jailed", smartvm.LaunchJailed) },
		b.sdkStart,
	}
	for round := range warmup + b.rounds {
		b.report.counting = round >= warmup
		for _, i := range rand.Perm(len(ways)) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := ways[i](ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) bareStart() error {
	v, err := b.startBare("bare", b.idle, b.drive)
	if err != nil {
		return err
	}
	b.report.time("bare", v.took)
	begun := time.Now()
	err = v.stop()
	b.report.time("bare-kill", time.Since(begun))
	return err
}

// watchMark returns a channel that is closed at the guest's first byte.
type watchMark struct{ seen chan time.Time }

func (w *watchMark) Write(p []byte) (int, error) {
	select {
	case w.seen <- time.Now():
	default:
	}
	return len(p), nil
}

func (b *bench) ourStart(ctx context.Context, name string, launcher smartvm.Launcher) error {
	watch := &watchMark{make(chan time.Time, 1)}
	h, err := b.host(launcher, func(string) io.Writer { return watch })
	if err != nil {
		return err
	}
	defer h.Close()
	begun := time.Now()
	m, err := h.Create(ctx, b.spec(smartvm.Drive{DriveID: "data", PathOnHost: b.drive}))
	if err != nil {
		return err
	}
	created := time.Since(begun)
	begun = time.Now()
	if err := m.Start(ctx); err != nil {
		return errors.Join(err, m.Remove(ctx))
	}
	var first time.Duration
	select {
	case at := <-watch.seen:
		first = at.Sub(begun)
	case <-time.After(10 * time.Second):
		err = fmt.Errorf("%s: the guest says nothing", name)
	}
	stopped := time.Now()
	_, stopErr := m.Stop(ctx, smartvm.StopOptions{})
	stop := time.Since(stopped)
	if err := errors.Join(err, stopErr, m.Remove(ctx)); err != nil {
		return err
	}
	b.report.time(name, first)
	b.report.time("create+"+name, created+first)
	if launcher == smartvm.LaunchDirect {
		b.report.time("create", created)
		b.report.time("stop", stop)
	}
	return nil
}

func (b *bench) sdkStart(ctx context.Context) error {
	dir := filepath.Join(b.dir, "sdk")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	socket := filepath.Join(dir, "socket")
	vmmCtx, kill := context.WithCancel(ctx)
	defer kill()
	cmd := sdk.VMCommandBuilder{}.WithBin(b.firecracker).WithSocketPath(socket).
		WithArgs([]string{"--level", "Off"}).WithStdout(write).WithStderr(io.Discard).Build(vmmCtx)
	begun := time.Now()
	m, err := sdk.NewMachine(vmmCtx, sdk.Config{
		SocketPath: socket, KernelImagePath: b.idle, LogLevel: "Error", ForwardSignals: []os.Signal{},
		MachineCfg: models.MachineConfiguration{VcpuCount: sdk.Int64(1), MemSizeMib: sdk.Int64(128)},
		Drives:     sdk.NewDrivesBuilder(b.drive).Build(),
	}, sdk.WithProcessRunner(cmd), sdk.WithLogger(logrus.NewEntry(quiet)))
	if err != nil {
		return errors.Join(err, write.Close())
	}
	err = errors.Join(m.Start(vmmCtx), write.Close())
	if err == nil {
		err = await(read)
	}
	took := time.Since(begun)
	if stopErr := m.StopVMM(); err == nil {
		err = stopErr
	}
	waited, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_ = m.Wait(waited) // "signal: killed" is what it should say
	if err != nil {
		return fmt.Errorf("go-sdk: %w", err)
	}
	b.report.time("go-sdk", took)
	return nil
}
