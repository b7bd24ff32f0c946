package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/cgroup"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
)

// Config is what it takes to start a VMM.
type Config struct {
	ID     string
	Binary string  // Firecracker; its name contains "firecracker" where it is jailed
	Jailer *Jailer // nil: started directly
	Dir    string  // absolute, exists, empty; everything the run makes is below it
	Cgroup string  // an existing group for this process alone; "": there is none
	NetNS  string  // the file of the network namespace that it runs in; "": this process's
	PCI    bool    // its devices are on a PCI bus

	Items   []stage.Item // what the VMM is given under its working directory
	Log     LogOptions
	Streams Streams
}

// Jailer starts the VMM as a user of its own in a chroot of its own. It needs root.
type Jailer struct {
	Binary string
	UID    int // and the GID of the same number
}

// LogOptions are the VMM's own, as in the API's Logger.
type LogOptions struct {
	Level      string // Error, Warning, Info, Debug, Trace or Off
	ShowLevel  bool
	ShowOrigin bool
}

// Streams take what the VMM writes, each from one goroutine. A writer that blocks makes the VMM
// drop output, never wait. They are closed when the VMM has ended and all it wrote has been passed
// on. A writer that still blocks then does not keep the VMM: it is closed whenever it returns.
type Streams struct {
	Console io.WriteCloser
	Log     io.WriteCloser
	Metrics io.WriteCloser // if nil, no metrics FIFO is made
	// Lost, if not nil, is called for the first write to each stream that fails, with the path of its
	// FIFO. Later ones are lost in silence.
	Lost func(path string, err error)
}

// Close closes them all. It is for a VMM that was not started.
func (s Streams) Close() error {
	var errs []error
	for _, w := range []io.WriteCloser{s.Console, s.Log, s.Metrics} {
		if w == nil {
			continue
		}
		if err := w.Close(); !errors.Is(err, fs.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Root is the VMM's working directory as the host sees it.
func (c *Config) Root() string { return Root(c.Dir, c.ID, c.Binary, c.Jailer != nil) }

// Root is the working directory of the VMM of a run in dir.
func Root(dir, id, binary string, jailed bool) string {
	if jailed {
		return filepath.Join(dir, store.JailDir, filepath.Base(binary), id, "root")
	}
	return filepath.Join(dir, store.RootDir)
}

// Argv is the command line of the process to start. Options of the VMM come last, after "--" of the
// jailer.
func (c *Config) Argv() []string {
	level := c.Log.Level
	if level == "" {
		level = "Warning"
	}
	args := []string{"--api-sock", store.SocketFile, "--log-path", store.LogFIFO, "--level", level}
	if c.Log.ShowLevel {
		args = append(args, "--show-level")
	}
	if c.Log.ShowOrigin {
		args = append(args, "--show-log-origin")
	}
	if c.PCI {
		args = append(args, "--enable-pci")
	}
	if c.Jailer == nil {
		return append([]string{c.Binary, "--id", c.ID}, args...)
	}
	uid := strconv.Itoa(c.Jailer.UID)
	jail := []string{
		c.Jailer.Binary, "--id", c.ID, "--exec-file", c.Binary, "--uid", uid, "--gid", uid,
		"--chroot-base-dir", filepath.Join(c.Dir, store.JailDir),
	}
	if c.NetNS != "" {
		jail = append(jail, "--netns", c.NetNS)
	}
	// Nothing about cgroups: the VMM is spawned into its own, and asked for version 2 the jailer takes
	// 1 ms to read the mount table, and moves its process if there is a group of the program's name,
	// which takes 10.
	return append(append(jail, "--"), args...)
}

// Process is a VMM that runs, or ran. As an effect, Apply starts it and Revert kills it. It is
// identified by its control group, or where there is none by its root or working directory: never
// by its PID.
type Process struct {
	Dir    string `json:"dir"`
	Cgroup string `json:"cgroup,omitempty"`

	cfg     *Config
	child   *os.Process   // nil unless this process started it
	adopted bool          // it is another's, and watched like our own
	hold    *os.File      // keeps the metrics FIFO from seeming to end before the VMM has opened it
	done    chan struct{} // closed when exit is set and the streams are drained, or given up
	exit    Exit
	pumps   []*pump
	pumped  chan struct{} // closed when they have ended
}

// New describes the VMM of cfg, to be started by Apply.
func New(cfg *Config) *Process {
	return &Process{Dir: cfg.Dir, Cgroup: cfg.Cgroup, cfg: cfg, done: make(chan struct{}), pumped: make(chan struct{})}
}

// Barrier keeps what the VMM uses, as drives that it has open, until it has ended.
func (p *Process) Barrier() {}

// Apply starts the VMM. It does not wait for the API: see Dial.
func (p *Process) Apply(ctx context.Context) error {
	root := p.cfg.Root()
	if err := os.MkdirAll(root, 0o700); err != nil {
		return fmt.Errorf("start VMM: %w", err)
	}
	binds, err := p.place(ctx, root)
	if err != nil {
		return err
	}
	pumps, stdio, err := p.openStreams(root)
	if err == nil {
		stdio[0], err = p.makeInput()
	}
	if err == nil {
		err = p.exec(root, binds, pumps, stdio)
	}
	if err != nil {
		for _, f := range append(stdio[:], p.hold) {
			f.Close()
		}
		for _, pump := range pumps {
			pump.close()
		}
		return fmt.Errorf("start VMM: %w", err)
	}
	return nil
}

// exec starts the process and gives the streams to it and to a goroutine that waits for its end.
func (p *Process) exec(root string, binds []stage.Bind, pumps []*pump, stdio [3]*os.File) error {
	argv := p.cfg.Argv()
	cmd := &exec.Cmd{
		Path: argv[0], Args: argv, Dir: root, Env: []string{}, Stdin: stdio[0], Stdout: stdio[1], Stderr: stdio[2],
	}
	// What is typed at our terminal is not for it. Nor is it a session: a kernel that gives each
	// session as much of the processor as another (autogroup) would give us, who start many, no more
	// than one of them.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	child, err := p.spawn(cmd, binds)
	for _, f := range stdio {
		f.Close()
	}
	if err != nil {
		return err
	}
	p.child = child
	p.pump(pumps)
	go p.reap()
	return nil
}

func (p *Process) place(ctx context.Context, root string) ([]stage.Bind, error) {
	if p.cfg.Jailer == nil {
		return nil, stage.PlaceLinks(root, p.cfg.Items)
	}
	return stage.PlaceJailed(ctx, root, p.cfg.Jailer.UID, p.cfg.Items)
}

// openStreams makes the FIFOs and returns their readers, and what the VMM gets as stdout and
// stderr, the second and third of stdio. FIFOs rather than pipes, so that another process can take
// over when this one dies.
func (p *Process) openStreams(root string) (pumps []*pump, stdio [3]*os.File, err error) {
	s := p.cfg.Streams
	for _, f := range []struct {
		path string
		to   io.WriteCloser
	}{
		{filepath.Join(p.Dir, store.ConsoleFIFO), s.Console},
		{filepath.Join(root, store.LogFIFO), s.Log},
		{filepath.Join(root, store.MetricsFIFO), s.Metrics},
	} {
		if f.to == nil {
			continue
		}
		if err := p.makeFIFO(f.path); err != nil {
			return pumps, stdio, err
		}
		pump, err := openPump(f.path, f.to, s.Lost)
		if err != nil {
			return pumps, stdio, err
		}
		pumps = append(pumps, pump)
	}
	if len(pumps) == 3 {
		if p.hold, err = os.OpenFile(pumps[2].path, os.O_WRONLY|unix.O_NONBLOCK, 0); err != nil {
			return pumps, stdio, err
		}
	}
	for i, pump := range pumps[:2] {
		// Read-write, so that the VMM gets no SIGPIPE when whoever reads has died.
		if stdio[i+1], err = os.OpenFile(pump.path, os.O_RDWR|unix.O_NONBLOCK, 0); err != nil {
			return pumps, stdio, err
		}
	}
	return pumps, stdio, nil
}

func (p *Process) makeFIFO(path string) error {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return fmt.Errorf("make FIFO %s: %w", path, err)
	}
	if p.cfg.Jailer == nil {
		return nil
	}
	return os.Lchown(path, p.cfg.Jailer.UID, p.cfg.Jailer.UID)
}

func (p *Process) reap() {
	state, _ := p.child.Wait()
	p.hold.Close()
	p.exit = exitOf(state)
	p.drain()
}

// pump has the streams passed on.
func (p *Process) pump(pumps []*pump) {
	p.pumps = pumps
	var wg sync.WaitGroup
	for _, pump := range pumps {
		wg.Go(pump.run)
	}
	go func() { wg.Wait(); close(p.pumped) }()
}

// Release leaves the streams to another process, and returns when nothing more is read of them.
// Done still tells of the VMM's end.
func (p *Process) Release() {
	for _, pump := range p.pumps {
		_ = pump.f.SetReadDeadline(time.Unix(1, 0))
	}
	select {
	case <-p.pumped:
	case <-time.After(drainTimeout): // a writer that blocks
	}
}

// drainTimeout bounds how long the end of a VMM is held up by a stream that another process keeps
// open, and then by a writer that blocks.
const drainTimeout = time.Second

func (p *Process) drain() {
	for _, pump := range p.pumps {
		_ = pump.f.SetReadDeadline(time.Now().Add(drainTimeout)) // or it has ended
	}
	timer := time.NewTimer(2 * drainTimeout)
	defer timer.Stop()
	select {
	case <-p.pumped:
	case <-timer.C: // the goroutines of writers that block end when those return
	}
	close(p.done)
}

// Attach finds the VMM of a run that this process did not start, to kill it, wait for it or ask
// whether it lives.
func Attach(dir, group string) *Process { return &Process{Dir: dir, Cgroup: group} }

// Adopt takes over a VMM whose starter died: its streams are passed on again and Done tells of its
// end. How it ends is known where the kernel tells others than the parent (Linux >= 6.15), or the
// parent is slow.
func Adopt(cfg *Config) (*Process, error) {
	p := New(cfg)
	p.adopted = true
	var pumps []*pump
	for path, to := range map[string]io.WriteCloser{
		filepath.Join(cfg.Dir, store.ConsoleFIFO):    cfg.Streams.Console,
		filepath.Join(cfg.Root(), store.LogFIFO):     cfg.Streams.Log,
		filepath.Join(cfg.Root(), store.MetricsFIFO): cfg.Streams.Metrics,
	} {
		if to == nil {
			continue
		}
		pump, err := openPump(path, to, cfg.Streams.Lost)
		if err != nil {
			for _, pump := range pumps {
				pump.close()
			}
			return nil, fmt.Errorf("adopt VMM: %w", err)
		}
		pumps = append(pumps, pump)
	}
	p.pump(pumps)
	ended := p.openForeign()
	go func() {
		for p.waitIdentity(context.Background()) != nil {
			time.Sleep(identityPoll)
		}
		p.exit = ended.exit()
		p.drain()
	}()
	return p, nil
}

// Done is closed when the VMM has ended and all it wrote has been passed on. Nil for an attached
// process.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit tells how the VMM ended, once Done is closed.
func (p *Process) Exit() Exit { return p.exit }

// PIDs lists the VMM's processes, for people to read.
func (p *Process) PIDs() ([]int, error) {
	if p.Cgroup != "" {
		return (&cgroup.Group{Path: p.Cgroup}).PIDs()
	}
	return findByDir(p.Dir)
}

// Revert kills the VMM and waits for its end.
func (p *Process) Revert(ctx context.Context) error {
	if err := p.signal(); err != nil {
		return fmt.Errorf("kill VMM: %w", err)
	}
	return p.Wait(ctx)
}

// signal sends SIGKILL to the VMM, and does not wait for its end.
func (p *Process) signal() error {
	if p.ended() {
		return nil
	}
	if p.child != nil { // also where somebody has moved it to another group
		if err := p.child.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
	}
	if p.Cgroup == "" {
		return signalByDir(p.Dir)
	}
	return (&cgroup.Group{Path: p.Cgroup}).Signal()
}

// ended says whether a VMM that this process supervises has ended.
func (p *Process) ended() bool {
	select {
	case <-p.done: // nil, and never ready, for an attached process
		return true
	default:
		return false
	}
}

// Alive says whether the VMM, or anything it started, runs.
func (p *Process) Alive() (bool, error) {
	if p.ended() {
		return false, nil
	}
	if p.Cgroup != "" {
		return (&cgroup.Group{Path: p.Cgroup}).Populated()
	}
	pids, err := p.PIDs()
	return len(pids) > 0, err
}

// Wait returns when the VMM has ended, or with the context's cause.
func (p *Process) Wait(ctx context.Context) error {
	if p.child == nil && !p.adopted { // nothing closes done
		return p.waitIdentity(ctx)
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for VMM: %w", context.Cause(ctx))
	}
}

func (p *Process) waitIdentity(ctx context.Context) error {
	if p.Cgroup != "" {
		return (&cgroup.Group{Path: p.Cgroup}).Wait(ctx)
	}
	return waitByDir(ctx, p.Dir)
}

// Stop asks the VMM, or its guest, to end, and kills the VMM if ask fails or if it has not ended
// within timeout; if that is 0, at once. It returns what helped: what ask has returned, Killed, or
// "" if the VMM had ended before.
func (p *Process) Stop(
	ctx context.Context, timeout time.Duration, ask func(context.Context) (string, error),
) (string, error) {
	if alive, err := p.Alive(); err == nil && !alive {
		return "", p.Wait(ctx)
	}
	if timeout > 0 {
		limit, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		how, err := ask(limit)
		if err == nil {
			err = p.Wait(limit)
		}
		if err == nil {
			return how, nil
		}
		if ctx.Err() != nil { // the caller has gone; the VM is none the worse
			return "", fmt.Errorf("stop VMM: %w", context.Cause(ctx))
		}
	}
	return Killed, p.Revert(ctx)
}

// Killed is what Stop returns when SIGKILL ended the VMM.
const Killed = "kill"

// Exit is how a VMM ended.
type Exit struct {
	Known  bool // false where another process was the parent, and the kernel did not tell
	Code   int  // exit status, -1 if a signal ended it
	Signal syscall.Signal
}

func exitOf(s *os.ProcessState) Exit {
	if s == nil {
		return Exit{}
	}
	ws, ok := s.Sys().(syscall.WaitStatus)
	if !ok {
		return Exit{}
	}
	return exitOfStatus(ws)
}

func exitOfStatus(s syscall.WaitStatus) Exit {
	if s.Signaled() {
		return Exit{Known: true, Code: -1, Signal: s.Signal()}
	}
	return Exit{Known: true, Code: s.ExitStatus()}
}

func (e Exit) String() string {
	switch {
	case !e.Known:
		return "exit status unknown"
	case e.Signal != 0:
		return "killed by " + e.SignalName()
	}
	return fmt.Sprintf("exit status %d", e.Code)
}

// SignalName is like "SIGKILL", "" if no signal ended the VMM.
func (e Exit) SignalName() string { return unix.SignalName(e.Signal) }

var errEnded = errors.New("VMM has ended")
