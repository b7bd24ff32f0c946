package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	sdk "github.com/firecracker-microvm/firecracker-go-sdk"
	"github.com/firecracker-microvm/firecracker-go-sdk/client/models"
	"github.com/sirupsen/logrus"

	"push.rocks/smartvm"
)

// warmup rounds are not counted.
const warmup = 5

// starts measures from spawn, or the call of Start, to the guest's first byte, each way once a
// round, in an order drawn for each round.
func (b *bench) starts(ctx context.Context) (err error) {
	direct, err := b.host(smartvm.LaunchDirect)
	if err != nil {
		return err
	}
	defer direct.Close()
	jailed, err := b.host(smartvm.LaunchJailed)
	if err != nil {
		return err
	}
	defer jailed.Close()
	ways := []func(at float64) error{
		func(at float64) error { return b.bareStart(ctx, at) },
		func(at float64) error { return b.ourStart(ctx, at, "start", direct) },
		func(at float64) error { return b.sdkStart(ctx, at) },
	}
	if os.Geteuid() == 0 {
		ways = append(ways, func(at float64) error { return b.ourStart(ctx, at, "start-jailed", jailed) })
	} else {
		fmt.Fprintln(os.Stderr, "bench: start-jailed needs root: skipped")
	}
	if b.FCTools != "" {
		f, err2 := b.startFCTools(ctx, "start", b.idle, b.drive)
		if err2 != nil {
			return err2
		}
		defer func() { err = errors.Join(err, f.end()) }()
		ways = append(ways, func(at float64) error {
			took, err := f.start(ctx, at)
			b.samples.time("fctools", took)
			return err
		})
	}
	for round := range warmup + b.Rounds {
		b.samples.counting = round >= warmup
		for _, i := range rand.Perm(len(ways)) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := ways[i](moment(round)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) bareStart(ctx context.Context, at float64) error {
	align(ctx, at)
	v, err := b.startBare(ctx, "bare", b.idle, b.drive)
	if err != nil {
		return err
	}
	b.samples.time("bare", v.took)
	begun := time.Now()
	err = v.stop()
	b.samples.time("bare-kill", time.Since(begun))
	return err
}

// host is a smartvm.Host that tells of each VM's first byte.
type host struct {
	*smartvm.Host
	bytes sync.Map // of chan time.Time, by VM id
}

func (b *bench) host(launcher smartvm.Launcher) (*host, error) { return b.hostFor(launcher, mark, nil) }

func (b *bench) hostFor(launcher smartvm.Launcher, mark string, log *slog.Logger) (*host, error) {
	h := &host{}
	var err error
	h.Host, err = smartvm.Open(smartvm.Options{
		RuntimeDir: b.runtimeDir(), DataDir: b.dataDir(),
		FirecrackerBinary: b.Firecracker, JailerBinary: b.Jailer, Launcher: launcher, Log: log,
		Console: func(id string) io.Writer {
			c, _ := h.bytes.LoadOrStore(id, make(chan time.Time, 1))
			return firstByte{c.(chan time.Time), mark}
		},
	})
	return h, err
}

// firstByte receives the time of the first write that has the mark in it.
type firstByte struct {
	at   chan time.Time
	mark string
}

func (c firstByte) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte(c.mark)) {
		select {
		case c.at <- time.Now():
		default:
		}
	}
	return len(p), nil
}

// start starts m and returns when its first byte came.
func (h *host) start(ctx context.Context, m *smartvm.Machine) (time.Time, error) {
	defer h.bytes.Delete(m.ID())
	c, _ := h.bytes.LoadOrStore(m.ID(), make(chan time.Time, 1))
	if err := m.Start(ctx); err != nil {
		return time.Time{}, err
	}
	select {
	case at := <-c.(chan time.Time):
		return at, nil
	case <-ctx.Done():
		return time.Time{}, context.Cause(ctx)
	case <-time.After(guestTimeout):
		return time.Time{}, errors.New("the guest says nothing")
	}
}

func (b *bench) ourStart(ctx context.Context, at float64, name string, h *host) error {
	begun := time.Now()
	m, err := h.Create(ctx, b.spec(smartvm.Drive{DriveID: "data", PathOnHost: b.drive}))
	if err != nil {
		return err
	}
	created := time.Since(begun)
	align(ctx, at)
	begun = time.Now()
	first, err := h.start(ctx, m)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	started := first.Sub(begun)
	begun = time.Now()
	_, err = m.Stop(ctx, smartvm.StopOptions{})
	stopped := time.Since(begun)
	if err := errors.Join(err, m.Remove(ctx)); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	b.samples.time(name, started)
	b.samples.time("create+"+name, created+started)
	if name == "start" {
		b.samples.time("create", created)
		b.samples.time("stop", stopped)
	}
	return nil
}

func (b *bench) sdkStart(ctx context.Context, at float64) error {
	dir := filepath.Join(b.Dir, "sdk")
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
	cmd := sdk.VMCommandBuilder{}.WithBin(b.Firecracker).WithSocketPath(socket).
		WithArgs([]string{"--level", "Off"}).WithStdout(write).WithStderr(io.Discard).Build(vmmCtx)
	align(ctx, at)
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
	waited, cancel := context.WithTimeout(context.WithoutCancel(ctx), guestTimeout)
	defer cancel()
	_ = m.Wait(waited) // "signal: killed" is what it should say
	if err != nil {
		return fmt.Errorf("go-sdk: %w", err)
	}
	b.samples.time("go-sdk", took)
	return nil
}
