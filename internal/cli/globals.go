package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/internal/cli/registry"
	"push.rocks/smartvm/internal/supervise"
	"push.rocks/smartvm/internal/vmflags"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/policy"
)

// globals are the settings that every command has.
type globals struct {
	runtimeDir, dataDir, firecracker, jailer string
	launcher, version, releases              string
	ephemeral, offline                       bool
	registry                                 registry.Flags
	limits                                   vmflags.Limits
	manifest                                 string
	bridge, subnet, firewall                 string
	output, logLevel                         string
	verbose                                  bool

	log    *slog.Logger
	policy *policy.Policy // firewall, read
}

func (g *globals) flags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.SortFlags = false
	f.StringVar(&g.runtimeDir, "runtime-dir", "",
		"where VMs are kept, a `dir` on tmpfs if possible [$SMARTVM_RUNTIME_DIR]")
	f.StringVar(&g.dataDir, "data-dir", "", "where what outlives them is kept, a `dir` [$SMARTVM_DATA_DIR]")
	f.StringVar(&g.firecracker, "firecracker", "", "`path` of the VMM, if not in PATH [$SMARTVM_FIRECRACKER]")
	f.StringVar(&g.version, "firecracker-version", "", "`version` of the VMM, of those installed")
	f.StringVar(&g.releases, "firecracker-releases", "",
		"where releases of the VMM are, a `URL` [$SMARTVM_FIRECRACKER_RELEASES]")
	f.StringVar(&g.jailer, "jailer", "", "`path` of the jailer, if not beside the VMM [$SMARTVM_JAILER]")
	f.StringVar(&g.launcher, "launcher", "", "`how` to start the VMM: jailer (what root gets) or direct")
	f.BoolVar(&g.ephemeral, "ephemeral-writable-drives", true, "give each VM a copy of its writable drives")
	f.BoolVar(&g.offline, "offline", false, "fetch nothing")
	g.registry.Global(f, os.LookupEnv)
	g.limits.Flags(f)
	f.StringVar(&g.manifest, "base-manifest", "", "manifest of base:hosted, a `path` or URL [$SMARTVM_BASE_MANIFEST]")
	f.StringVar(&g.bridge, "bridge", "", "`name` of the default network's bridge, "+network.DefaultBridge+
		" without it [$SMARTVM_BRIDGE]")
	f.StringVar(&g.subnet, "subnet", "", "the default network's IPv4 `subnet`, "+network.DefaultSubnet+
		" without it [$SMARTVM_SUBNET]")
	f.StringVar(&g.firewall, "firewall", "",
		"JSON `file` with what VMs may reach at most, on networks without a policy [$SMARTVM_FIREWALL]")
	f.StringVarP(&g.output, "output", "o", "table", "`form` of the output: table or json")
	f.StringVar(&g.logLevel, "log-level", "warn", "what to log on stderr: `level` debug, info, warn or error")
	f.BoolVar(&g.verbose, "verbose", false, "the same as --log-level debug")
	for name, values := range map[string][]string{
		"launcher": {"jailer", "direct"}, "output": {"table", "json"}, "log-level": {"debug", "info", "warn", "error"},
	} {
		_ = root.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
}

// finish checks what the flags were given, and asks the environment about those that were not.
func (g *globals) finish(ctx context.Context, a *app) error {
	for name, to := range map[string]*string{
		"SMARTVM_RUNTIME_DIR": &g.runtimeDir, "SMARTVM_DATA_DIR": &g.dataDir, "SMARTVM_FIRECRACKER": &g.firecracker,
		"SMARTVM_JAILER": &g.jailer,
		"SMARTVM_BRIDGE": &g.bridge, "SMARTVM_SUBNET": &g.subnet, "SMARTVM_FIREWALL": &g.firewall,
		"SMARTVM_BASE_MANIFEST": &g.manifest, "SMARTVM_FIRECRACKER_RELEASES": &g.releases,
	} {
		*to = cmp.Or(*to, os.Getenv(name))
	}
	for _, path := range []*string{&g.runtimeDir, &g.dataDir, &g.firecracker, &g.jailer} { // for self
		if *path == "" || (path == &g.firecracker || path == &g.jailer) && !strings.Contains(*path, "/") {
			continue // a program in PATH
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	switch err := errors.Join(g.limits.Finish(os.Getenv), g.registry.Finish(ctx, a.Stdin, a.Stderr)); {
	case err != nil:
		return usage("%w", err)
	case !slices.Contains([]string{"table", "json"}, g.output):
		return usage("-o %q: want table or json", g.output)
	case !slices.Contains([]string{"", string(smartvm.LaunchDirect), string(smartvm.LaunchJailed)}, g.launcher):
		return usage("--launcher %q: want jailer or direct", g.launcher)
	}
	c, err := network.NewDefault(g.bridge, g.subnet)
	if err != nil {
		return usage("--subnet: %w", err)
	}
	if g.firewall != "" {
		if g.policy, err = policy.LoadFile(g.firewall); err == nil {
			c.Policy = g.policy
			err = c.Validate()
		}
		if err == nil {
			g.firewall, err = filepath.Abs(g.firewall) // for self
		}
		if err != nil {
			return usage("--firewall %s: %w", g.firewall, err)
		}
	}
	a.json = g.output == "json"
	level := slog.LevelDebug
	if !g.verbose {
		if err := level.UnmarshalText([]byte(g.logLevel)); err != nil || strings.ContainsAny(g.logLevel, "+-") {
			return usage("--log-level %q: want debug, info, warn or error", g.logLevel)
		}
	}
	g.log = slog.New(slog.NewTextHandler(a.Stderr, &slog.HandlerOptions{Level: level}))
	return nil
}

// open opens the host, after what died has been cleared away. The caller closes it.
func (a *app) open(ctx context.Context) (*smartvm.Host, error) {
	h, _, err := a.sweep(ctx)
	return h, err
}

// sweep is open, and tells what was found.
func (a *app) sweep(ctx context.Context) (*smartvm.Host, *smartvm.Report, error) {
	h, err := a.peek()
	if err != nil {
		return nil, nil, err
	}
	report, err := h.Sweep(ctx)
	if report == nil {
		return nil, nil, errors.Join(err, h.Close())
	}
	// What is wrong with some VM need not concern this command.
	if err := errors.Join(err, supervise.Sweep(ctx, h)); err != nil {
		a.global.log.Warn("clear up", "err", err)
	}
	return h, report, nil
}

// self is a command line of this program for the same host.
func (g *globals) self(args ...string) []string {
	program, _ := os.Executable() // what cannot be found cannot be started
	all := []string{program}
	for name, value := range map[string]string{
		"runtime-dir": g.runtimeDir, "data-dir": g.dataDir, "firecracker": g.firecracker, "firecracker-version": g.version,
		"jailer":               g.jailer,
		"firecracker-releases": g.releases, "launcher": g.launcher, "bridge": g.bridge, "subnet": g.subnet,
		"firewall": g.firewall,
	} {
		if value != "" {
			all = append(all, "--"+name, value)
		}
	}
	return slices.Concat(all, g.limits.Args(), args)
}

// peek opens the host and leaves it as it is.
func (a *app) peek() (*smartvm.Host, error) {
	g := &a.global
	dataDir := g.dataDir
	if home := os.Getenv("XDG_DATA_HOME"); dataDir == "" && filepath.IsAbs(home) && os.Geteuid() != 0 {
		dataDir = filepath.Join(home, "smartvm")
	}
	o := smartvm.Options{
		RuntimeDir: g.runtimeDir, DataDir: dataDir, FirecrackerBinary: g.firecracker, FirecrackerVersion: g.version,
		JailerBinary: g.jailer,
		BridgeName:   g.bridge, Subnet: g.subnet, Firewall: g.policy, Launcher: smartvm.Launcher(g.launcher),
		EphemeralWritableDrives: &g.ephemeral, Log: g.log, Progress: a.copying.Set,
		LookupEnv: os.LookupEnv,
	}
	o.Images = image.Options{
		Offline: g.offline, Limits: g.limits.Limits(), Progress: a.images.Progress,
		Waiting: a.images.Waiting,
	}
	o.Images.OCI = g.registry.Options(g.log)
	o.Images.OCI.Stdin = a.Stdin
	o.Install, o.Installed, o.Binaries.URL = true, a.images.Installed, g.releases
	if strings.Contains(g.manifest, "://") {
		o.BaseImages.ManifestURL = g.manifest
	} else {
		o.BaseImages.ManifestPath = g.manifest
	}
	return smartvm.Open(o)
}

// label is what people call a VM.
func label(m *smartvm.Machine) string { return cmp.Or(m.Name(), m.ID()) }

// entry is what a command's JSON says of a VM that it did something to.
type entry struct {
	ID   string `json:"id"`
	Name string `json:"name,omitempty"`
}

func entryOf(m *smartvm.Machine) entry { return entry{m.ID(), m.Name()} }

// printID is the output of a command that makes a VM.
func (a *app) printID(m *smartvm.Machine) error {
	if a.json {
		return writeJSON(a.Stdout, entryOf(m))
	}
	_, err := fmt.Fprintln(a.Stdout, m.ID())
	return err
}
