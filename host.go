package smartvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/image/release"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/cgroup"
	"push.rocks/smartvm/internal/events"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/locate"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/resolve"
	"push.rocks/smartvm/internal/secret"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/uffd"
	"push.rocks/smartvm/internal/vmrun"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/guard"
	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/snapshot"
	"push.rocks/smartvm/status"
)

// Options configure a Host. The zero value serves.
type Options struct {
	// RuntimeDir holds what dies with the VMs. Default: DefaultRuntimeDir().
	RuntimeDir string `json:"runtimeDir,omitempty"`
	// DataDir holds what outlives them. Default: /var/lib/smartvm for root, else .local/share/smartvm
	// in the user's home.
	DataDir string `json:"dataDir,omitempty"`
	// FirecrackerBinary is the VMM. Default: of FirecrackerVersion if that is given, else
	// "firecracker" in PATH, else the newest that is installed: see Binaries. Without either, a
	// restore may take another installed one: see Restore.
	FirecrackerBinary  string `json:"firecrackerBinaryPath,omitempty"`
	FirecrackerVersion string `json:"firecrackerVersion,omitempty"` // of those installed: "v1.12.1"
	// JailerBinary is the jailer. Default: "jailer" beside the VMM, else in PATH.
	JailerBinary string `json:"jailerBinaryPath,omitempty"`
	// Launcher says how VMMs are started. Default: LaunchJailed for root, else LaunchDirect.
	Launcher Launcher `json:"launcher,omitempty"`
	// EphemeralWritableDrives gives each VM its own copy of the writable drives that do not say
	// whether they want one. Nil means true.
	EphemeralWritableDrives *bool `json:"ephemeralWritableDrives,omitempty"`
	// BridgeName and Subnet are the default network's. Default: network.DefaultBridge,
	// network.DefaultSubnet. Firewall is what guests of all networks may reach at most that have no
	// policy of their own. Nil: anything but the host and each other.
	BridgeName string         `json:"bridgeName,omitempty"`
	Subnet     string         `json:"subnet,omitempty"`
	Firewall   *policy.Policy `json:"firewall,omitempty"`
	// Images, BaseImages and Binaries say how images and Firecracker are found and fetched. Their
	// directories and Log are the host's (but for one of BaseImages' own); Offline, Progress and
	// Waiting of Images are for all.
	Images     image.Options   `json:"-"`
	BaseImages base.Options    `json:"-"`
	Binaries   release.Options `json:"-"`
	// Install has what new VMs need and this machine lacks fetched: Firecracker, the newest release,
	// and a kernel. Images.Offline forbids it.
	Install bool `json:"-"`
	// Installed receives what was fetched for that, and where it is. It may be nil.
	Installed func(what, path string) `json:"-"`
	// StartTimeout bounds the time from the VMM's start until it has taken its configuration. Default:
	// DefaultStartTimeout.
	StartTimeout time.Duration `json:"-"`
	// Log receives log records. If nil, they are discarded.
	Log *slog.Logger `json:"-"`
	// Console returns the writer that receives the console of a VM that this process starts or adopts,
	// as it comes, or nil. A writer that blocks makes the VMM drop output. It may be nil: the console
	// is kept in a file anyhow.
	Console func(id string) io.Writer `json:"-"`
	// Progress receives how many bytes of a drive are copied, of how many. It may be nil.
	Progress func(drive string, done, total int64) `json:"-"`
	// LookupEnv finds what a VM's EnvFiles name without a value, like os.LookupEnv. Nil: it finds
	// nothing.
	LookupEnv func(name string) (value string, ok bool) `json:"-"`

	trace    journal.Trace // the crash matrix's way in
	noCgroup bool          // as on a host where none can be made

	healInterval time.Duration // how often VMs are repaired without an event
}

// Launcher is a way to start a VMM.
type Launcher string

// The launchers.
const (
	LaunchDirect Launcher = "direct" // as a child with our rights
	LaunchJailed Launcher = "jailer" // by Firecracker's jailer: own user, own root; needs root
)

// DefaultStartTimeout is generous: Firecracker answers within milliseconds, on an emulated host
// within a second.
const DefaultStartTimeout = 30 * time.Second

// DefaultRuntimeDir is .smartvm/runtime (.smartvm-UID/runtime for others than root) on the tmpfs at
// /dev/shm where there is one, else in the directory for temporary files.
func DefaultRuntimeDir() string {
	base, name := "/dev/shm", ".smartvm"
	if fi, err := os.Stat(base); err != nil || !fi.IsDir() {
		base = os.TempDir()
	}
	if uid := os.Geteuid(); uid != 0 {
		name += "-" + strconv.Itoa(uid)
	}
	return filepath.Join(base, name, "runtime")
}

// Host manages the VMs of one runtime directory. Any number of hosts, in any number of processes,
// may share one. It is safe for concurrent use.
type Host struct {
	opts   Options
	env    *vmrun.Env
	cgroup string // where VMs get their groups, "" if nowhere

	dataOnce sync.Once // makes the data directory

	images func() (*image.Store, error) // opens them once
	vmms   locate.Finder
	facts  func() (snapshot.HostFacts, error) // reads them once

	reaper network.Reaper
	guards guard.Keeper
	ring   events.Ring
}

// Open opens a runtime directory, which it makes if need be. It refuses one that another user could
// have prepared. It changes nothing about any VM; to clean up after a crash call Recover.
func Open(opts Options) (*Host, error) {
	if opts.RuntimeDir == "" {
		opts.RuntimeDir = DefaultRuntimeDir()
	}
	if opts.DataDir == "" {
		opts.DataDir = "/var/lib/smartvm"
		if home, err := os.UserHomeDir(); os.Geteuid() != 0 && err == nil {
			opts.DataDir = filepath.Join(home, ".local/share/smartvm")
		}
	}
	if opts.Launcher == "" {
		opts.Launcher = LaunchDirect
		if os.Geteuid() == 0 {
			opts.Launcher = LaunchJailed
		}
	}
	opts.StartTimeout = cmp.Or(opts.StartTimeout, DefaultStartTimeout)
	opts.Log = cmp.Or(opts.Log, slog.New(slog.DiscardHandler))
	for _, dir := range []*string{&opts.RuntimeDir, &opts.DataDir} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return nil, fmt.Errorf("open host: %w", err)
		}
		*dir = abs
	}
	st, err := store.Open(opts.RuntimeDir)
	if errors.Is(err, store.ErrUnsafe) {
		err = hint.Add(err, "remove it, or name another with --runtime-dir: it must be yours alone (mode 0700)")
	}
	if err != nil {
		return nil, fmt.Errorf("open runtime directory: %w", err)
	}
	h := &Host{opts: opts}
	h.env = &vmrun.Env{
		Host: plan.Host{Store: st, StageDir: filepath.Join(opts.DataDir, store.StageDir), Limits: opts.Images.Limits},
		Log:  opts.Log, Trace: opts.trace, StartTimeout: opts.StartTimeout,
		RepairEvery: cmp.Or(opts.healInterval, defaultRepairInterval),
		Event:       h.ring.Append, Context: h.networkContext, Console: opts.Console, Progress: opts.Progress,
		LookupEnv: opts.LookupEnv,
		Memory:    sync.OnceValue(func() *uffd.Server { return uffd.NewServer(opts.Log) }),
	}
	h.openRing()
	h.images = sync.OnceValues(h.openImages)
	h.facts = sync.OnceValues(snapshot.ReadHostFacts)
	h.vmms.Binary, h.vmms.Version, h.vmms.Installed = opts.FirecrackerBinary, opts.FirecrackerVersion, h.installed
	if opts.noCgroup {
		return h, nil
	}
	if h.cgroup, err = cgroup.Parent("smartvm"); err != nil {
		return nil, fmt.Errorf("open host: %w", err)
	}
	return h, nil
}

// RuntimeDir is the directory that h manages, absolute.
func (h *Host) RuntimeDir() string { return h.opts.RuntimeDir }

// DataDir holds what outlives VMs, absolute.
func (h *Host) DataDir() string { return h.opts.DataDir }

// Close releases the VMs that this process supervises and leaves them running. Recover, in any
// process, takes them up.
func (h *Host) Close() error {
	err := h.env.Close()
	h.ring.Flush()
	return err
}

// Create makes a VM that is ready to be started. The spec is checked against itself and the host,
// everything wrong is reported at once as joined *FieldErrors, and nothing is left behind then.
// Returns ErrExists where id or name are taken, image.ErrNotFound where the image is not here.
func (h *Host) Create(ctx context.Context, spec Spec) (*Machine, error) {
	m, lock, err := h.create(ctx, spec, nil)
	if err != nil {
		return nil, err
	}
	return m, lock.Unlock()
}

// create returns the new VM's lock as well, which the caller gives up. Attached, if not nil, says
// that the VM is one call's.
func (h *Host) create(ctx context.Context, spec Spec, attached *RunOptions) (_ *Machine, _ *store.Lock, err error) {
	h.dataOnce.Do(func() {
		if err := errors.Join(store.Secure(h.opts.DataDir), store.Secure(h.env.StageDir)); err != nil {
			h.env.Log.Debug("no place for reflinks", "err", err)
		}
	})
	d, err := h.prepare(ctx, spec)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, d.release()) }()
	d.in.Attached = attached != nil
	if attached != nil && attached.Command != nil && d.in.HasAgent() {
		d.in.Boot.Guest.Attach = !d.in.Boot.Guest.HasInit()
	}
	vm, lock, err := h.env.Make(ctx, d.in)
	if err != nil {
		return nil, nil, err
	}
	vm.Provide(d.secrets)
	h.env.Log.Info("created", "vm", d.in.ID)
	vm.Event(status.EventCreated, "image", d.in.Spec.Image)
	return &Machine{h, vm}, lock, nil
}

// Plan says, as JSON, what creating and starting a VM would do to the host, and does none of it. Of
// an image, what all its VMs share may be made ready in the data directory.
func (h *Host) Plan(ctx context.Context, spec Spec) ([]byte, error) {
	d, err := h.prepare(ctx, spec)
	if err != nil {
		return nil, err
	}
	data, err := d.in.Plan().MarshalJSON()
	return data, errors.Join(err, d.release())
}

// draft is a VM that can be made.
type draft struct {
	in      *plan.Input
	secrets *Secrets
	release func() error // of its image, unless the VM has said that it uses it
}

// prepare checks spec and gathers what a plan needs, without any effect. The caller releases the
// draft.
func (h *Host) prepare(ctx context.Context, spec Spec) (_ *draft, err error) {
	rec := plan.New(spec.ID)
	spec.ID = rec.ID
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	bin, err := h.vmms.VMM(ctx)
	if err != nil {
		return nil, err
	}
	errs := append(share.Resolve(&spec), secret.Absolute(&spec))
	secrets, err := secret.Load(&spec, secret.Options{LookupEnv: h.opts.LookupEnv})
	if err := errors.Join(append(errs, err)...); err != nil {
		return nil, err
	}
	rec.Spec = spec
	networks, err := h.Networks()
	if err != nil {
		return nil, err
	}
	if rec.Interfaces,
		err = attach.Resolve(attach.VM{ID: rec.ID, Nonce: rec.Nonce, Store: h.env.Store}, &rec.Spec, networks); err != nil {
		return nil, err
	}
	boot, release, err := h.bootImage(ctx, &rec.Spec)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, release())
		}
	}()
	rec.Boot = boot
	if err := h.launcher(rec, bin); err != nil {
		return nil, err
	}
	rec.Ephemeral = h.opts.EphemeralWritableDrives == nil || *h.opts.EphemeralWritableDrives
	if rec.Extract, err = resolve.Spec(&rec.Spec, bin.Version, rec.Ephemeral); err != nil {
		return nil, err
	}
	if rec.HasAgent() { // on files that are made with the VM, or its run
		if err := h.addVolumes(ctx, rec); err != nil {
			return nil, err
		}
		addDrive(&rec.Spec,
			Drive{DriveID: guestDrive, PathOnHost: filepath.Join(h.env.Store.Dir(rec.ID), store.GuestFile), IsReadOnly: true})
	}
	in, err := h.env.Look(rec)
	if err != nil {
		return nil, err
	}
	return &draft{in: in, secrets: secrets, release: release}, nil
}

// launcher decides how the VMM is started.
func (h *Host) launcher(rec *plan.Record, bin locate.VMM) (err error) {
	rec.Binary, rec.BinaryVersion = bin.Path, bin.Version.String()
	if h.opts.Launcher == LaunchJailed {
		if rec.Jailer, err = locate.Jailer(bin, h.opts.JailerBinary); err != nil {
			return err
		}
	}
	if h.cgroup != "" {
		rec.Cgroup = filepath.Join(h.cgroup, rec.ID+"-"+rec.Nonce)
	}
	return nil
}

// Machine finds a VM by its id, its name or the beginning of its id, if only one has it. Returns
// ErrNotFound, ErrAmbiguous.
func (h *Host) Machine(_ context.Context, ref string) (*Machine, error) {
	ids, err := h.env.Store.List()
	if err != nil {
		return nil, err
	}
	if slices.Contains(ids, ref) { // before a name: an id is what programs use
		return h.byID(ref)
	}
	if id := h.env.Store.Holder("name", ref); id != "" {
		return h.byID(id)
	}
	ids = slices.DeleteFunc(ids, func(id string) bool { return !strings.HasPrefix(id, ref) })
	if len(ids) > 1 {
		return nil, fmt.Errorf("VM id prefix %q is %w: it matches %s", ref, ErrAmbiguous, strings.Join(ids, ", "))
	}
	if len(ids) == 0 || ref == "" {
		return nil, hint.Add(fmt.Errorf("VM %q: %w", ref, ErrNotFound), "smartvm ps lists the VMs there are")
	}
	return h.byID(ids[0])
}

func (h *Host) byID(id string) (*Machine, error) {
	vm, err := h.env.Open(id)
	if err != nil {
		return nil, err
	}
	return &Machine{h, vm}, nil
}

// Machines returns all VMs, by id. A VM that comes or goes meanwhile may be in it or not. An error
// is about VMs that cannot be read, which another version of smartvm may have made: all others are
// returned with it.
func (h *Host) Machines(context.Context) ([]*Machine, error) {
	ids, err := h.env.Store.List()
	if err != nil {
		return nil, err
	}
	var all []*Machine
	var errs []error
	for _, id := range ids {
		if m, err := h.byID(id); err == nil {
			all = append(all, m)
		} else if !errors.Is(err, ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return all, errors.Join(errs...)
}
