package update

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/vmflags"
)

// live are the flags about what a VM has only until its run ends.
type live struct {
	hotplug, balloon vmflags.Memory
	hinting          hinting
	drives           driveRates
}

const (
	hotplugFlag = "hotplug-memory"
	balloonFlag = "balloon"
	hintingFlag = "balloon-hinting"
	driveFlag   = "drive-rate"
)

var liveFlags = []string{hotplugFlag, balloonFlag, hintingFlag, driveFlag}

func (l *live) add(f *pflag.FlagSet) {
	f.Var(&l.hotplug, hotplugFlag,
		"`size` of the memory that it has besides its own, in MiB or like 2G: of a configuration with memoryHotplug, Firecracker 1.14")
	f.Var(&l.balloon, balloonFlag, "`size` of the memory that its balloon takes from it")
	f.Var(&l.hinting, hintingFlag,
		"`start|stop`: have it say once which memory is free, which the host takes back, or end that; of a configuration with freePageHinting, Firecracker 1.14")
	f.Var(&l.drives, driveFlag,
		"`ID=RATE`: how much it may read from and write to a drive, or flush to a pmem device (Firecracker 1.16), as for --rx; 0: all; may be repeated")
}

type step func(context.Context, *smartvm.Machine) error

// steps are what the flags ask for that were given, in order.
func (l *live) steps(f *pflag.FlagSet) (all []step) {
	if f.Changed(hotplugFlag) {
		all = append(all, func(ctx context.Context, m *smartvm.Machine) error {
			return m.UpdateMemoryHotplug(ctx, int(l.hotplug))
		})
	}
	if f.Changed(balloonFlag) {
		all = append(all, func(ctx context.Context, m *smartvm.Machine) error {
			return m.UpdateBalloon(ctx, uint32(l.balloon))
		})
	}
	switch l.hinting {
	case "start":
		all = append(all, func(ctx context.Context, m *smartvm.Machine) error { return m.StartBalloonHinting(ctx) })
	case "stop":
		all = append(all, func(ctx context.Context, m *smartvm.Machine) error { return m.StopBalloonHinting(ctx) })
	}
	for _, d := range l.drives {
		all = append(all, func(ctx context.Context, m *smartvm.Machine) error {
			if slices.ContainsFunc(m.Spec().Pmem, func(p smartvm.Pmem) bool { return p.ID == d.id }) {
				return m.UpdatePmem(ctx, d.id, d.limit)
			}
			return m.UpdateDrive(ctx, d.id, d.limit, false)
		})
	}
	return all
}

// hinting is the value of a flag: start or stop.
type hinting string

func (h *hinting) String() string { return string(*h) }

// Type is for pflag.
func (h *hinting) Type() string { return "start|stop" }

// Set takes start or stop.
func (h *hinting) Set(text string) error {
	if text != "start" && text != "stop" {
		return errors.New("want start or stop")
	}
	*h = hinting(text)
	return nil
}

// driveRates is the value of a flag: limits of drives.
type driveRates []driveRate

type driveRate struct {
	id    string
	limit *smartvm.RateLimiter
}

func (r *driveRates) String() string { return "" }

// Type is for pflag.
func (r *driveRates) Type() string { return "ID=RATE" }

// Set adds an ID=RATE.
func (r *driveRates) Set(text string) error {
	id, rate, ok := strings.Cut(text, "=")
	if !ok || id == "" {
		return errors.New("want ID=RATE")
	}
	limit, err := vmflags.ParseRate(rate)
	if err != nil {
		return fmt.Errorf("%q is no rate: %w", rate, err)
	}
	*r = append(*r, driveRate{id, limit})
	return nil
}
