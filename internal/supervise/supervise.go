// Package supervise is a detached VM's own process. It starts the VM (or takes up one whose process
// died), looks after it until it ends, removes it then if that was asked for, and exits. Whoever
// starts that process with Config.Spawn learns whether the VM runs, and why not.
package supervise

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/logfile"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network/policy"
)

// Verb is the first argument of a command line for this package.
const Verb = "supervise"

// Config is what such a process is told.
type Config struct {
	RuntimeDir string // absolute, as the others
	DataDir    string
	Firewall   string // file of the host's policy, or empty: see smartvm.Options
	ID         string
	Adopt      bool      // the VM runs already
	Warnings   io.Writer // is sent the lines that the start of Spawn's process warned by. If nil, they are in its log only
	Verbose    bool      // log every step
	// Secrets, if not nil, are the guest's. They go to the process by a pipe.
	Secrets    *smartvm.Secrets
	hasSecrets bool // the pipe is standard input
	ready      bool // whoever started us awaits word on readyFD
}

// readyFD is where the outcome of the start is written, as a message.
const readyFD = 3

type message struct {
	Error    *Failure `json:"error,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
}

func (c *Config) flags() *flag.FlagSet {
	f := flag.NewFlagSet("smartvm "+Verb, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.RuntimeDir, "runtime-dir", "", "")
	f.StringVar(&c.DataDir, "data-dir", "", "")
	f.StringVar(&c.Firewall, "firewall", "", "")
	f.BoolVar(&c.Adopt, "adopt", false, "")
	f.BoolVar(&c.Verbose, "verbose", false, "")
	f.BoolVar(&c.ready, "ready", false, "")
	f.BoolVar(&c.hasSecrets, "secrets", false, "")
	return f
}

// Args is the command line for c, Verb first.
func (c *Config) Args() []string {
	args := []string{Verb, "--runtime-dir", c.RuntimeDir, "--data-dir", c.DataDir, "--firewall", c.Firewall}
	for _, f := range []struct {
		name string
		on   bool
	}{{"--adopt", c.Adopt}, {"--verbose", c.Verbose}, {"--ready", c.ready}, {"--secrets", c.Secrets != nil}} {
		if f.on {
			args = append(args, f.name)
		}
	}
	return append(args, "--", c.ID) // an id may begin with a hyphen
}

// Parse reads what Args wrote, without the Verb.
func Parse(args []string) (*Config, error) {
	c := &Config{}
	f := c.flags()
	if err := f.Parse(args); err != nil {
		return nil, fmt.Errorf("%s: %w", Verb, err)
	}
	if f.NArg() != 1 {
		return nil, fmt.Errorf("%s: one VM id is needed, not %d", Verb, f.NArg())
	}
	c.ID = f.Arg(0)
	return c, nil
}

// logLimit is how much is kept of such a process's own log, in bytes.
const logLimit = 128 << 10

// Run is the process's life. It returns when the VM has ended. When ctx ends, it stops the VM
// first.
func Run(ctx context.Context, c *Config) error {
	// It lives as long as its VM and does next to nothing: memory is worth more than time.
	debug.SetGCPercent(25)
	var out lateWriter
	h, err := c.open(&out)
	if err == nil {
		defer h.Close() // when what has happened is among the events
	}
	var m *smartvm.Machine
	var log *logfile.Writer
	if err == nil {
		m, log, err = c.start(ctx, h, &out)
	}
	if log != nil {
		defer log.Close()
	}
	if c.ready {
		err = errors.Join(err, reportReady(err, out.warned()))
	}
	if err != nil {
		return err
	}
	debug.FreeOSMemory() // only the start needed it
	if _, err = m.Wait(ctx); ctx.Err() != nil {
		_, err = m.Stop(context.WithoutCancel(ctx), smartvm.StopOptions{Timeout: smartvm.DefaultStopTimeout})
	}
	if err == nil {
		err = RemoveEnded(context.WithoutCancel(ctx), m)
	}
	if err != nil && log != nil {
		slog.New(slog.NewTextHandler(log, nil)).Error("end", "vm", c.ID, "err", err)
	}
	return err
}

// open opens the host as the command that started this process has it.
func (c *Config) open(log io.Writer) (*smartvm.Host, error) {
	level := slog.LevelInfo
	if c.Verbose {
		level = slog.LevelDebug
	}
	o := smartvm.Options{
		RuntimeDir: c.RuntimeDir, DataDir: c.DataDir,
		Log: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: level})),
	}
	if c.Firewall != "" {
		var err error
		if o.Firewall, err = policy.LoadFile(c.Firewall); err != nil {
			return nil, fmt.Errorf("firewall %s: %w", c.Firewall, err)
		}
	}
	return smartvm.Open(o)
}

// start starts the VM, or adopts it.
func (c *Config) start(ctx context.Context, h *smartvm.Host, out *lateWriter) (*smartvm.Machine,
	*logfile.Writer, error,
) {
	m, err := h.Machine(ctx, c.ID)
	if err != nil {
		return nil, nil, err
	}
	log, err := logfile.Create(filepath.Join(m.RuntimeDir(), store.SuperviseLog), logLimit)
	if err != nil {
		return nil, nil, err
	}
	out.open(log)
	if c.hasSecrets {
		if err := json.NewDecoder(os.Stdin).Decode(&c.Secrets); err != nil {
			return nil, log, fmt.Errorf("read secrets: %w", err)
		}
		m.Provide(c.Secrets)
		c.Secrets = nil // the guest has them soon, and we forget
	}
	if !c.Adopt {
		return m, log, m.Start(ctx)
	}
	return m, log, adopt(ctx, m)
}

const (
	adoptTimeout = 5 * time.Second
	adoptPoll    = 10 * time.Millisecond
)

// adopt is patient with those who hold the VM's lock for the moment that it takes to look at it.
func adopt(ctx context.Context, m *smartvm.Machine) error {
	deadline := time.Now().Add(adoptTimeout)
	for {
		err := m.Adopt(ctx)
		if !errors.Is(err, store.ErrLocked) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(adoptPoll):
		}
	}
}

// reportReady says how the start went, what was warned of, and that it is over.
func reportReady(err error, warnings []string) error {
	f := os.NewFile(readyFD, "ready")
	msg := message{Warnings: warnings}
	if err != nil {
		msg.Error = Describe(err)
	}
	// Nobody may be there any more to hear it, which changes nothing.
	_ = json.NewEncoder(f).Encode(msg)
	return f.Close()
}

// lateWriter drops what comes before it is given where to put it, and keeps the warnings of the
// start.
type lateWriter struct {
	mu       sync.Mutex
	to       io.Writer
	warnings []string
	size     int
	over     bool // the start is
}

// maxWarnings bounds what is kept of warnings, in bytes: it is less than a message has.
const maxWarnings = maxMessage / 8

func (w *lateWriter) open(to io.Writer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.to = to
}

// warned returns the lines that the start warned by. Later ones are not kept.
func (w *lateWriter) warned() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	return w.warnings
}

// Write takes one line.
func (w *lateWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.to == nil {
		return len(p), nil
	}
	if !w.over && bytes.Contains(p, []byte(" level=WARN ")) && w.size+len(p) <= maxWarnings {
		w.warnings, w.size = append(w.warnings, strings.TrimSuffix(string(p), "\n")), w.size+len(p)
	}
	return w.to.Write(p)
}
