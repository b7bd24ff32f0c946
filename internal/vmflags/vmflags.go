// Package vmflags makes the configuration of a VM out of flags and a file.
package vmflags

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"push.rocks/smartvm/internal/secret"
	"push.rocks/smartvm/spec"
)

// Flags are what a VM's configuration is made of, with or without a file.
type Flags struct {
	// LookupEnv finds what -e names without a value, like os.LookupEnv. Nil: it finds nothing.
	LookupEnv func(name string) (value string, ok bool)

	set *pflag.FlagSet

	file                   string
	kernel, initrd, append string
	cpus                   int
	memory                 Memory
	drives                 []string
	name, id               string
	labels, nets, publish  []string
	ip                     string
	publishAll             bool
	dns, search, hosts     []string
	policy                 Policy
	vsock                  string

	entrypoint, user, workdir, hostname, keep string
	systemd                                   string
	env, envFiles, secrets, volumes           []string
	sync                                      bool
	scratch, volumeSize                       Memory
}

// What a VM gets that is configured by flags alone.
const (
	defaultCPUs   = 1
	defaultMemory = 128 // MiB
	imageMemory   = 512 // MiB, of one that boots an image
	defaultCID    = 3
)

// Add adds the flags to f.
func (s *Flags) Add(f *pflag.FlagSet) {
	s.set = f
	f.SortFlags = false
	s.memory = defaultMemory
	f.StringVarP(&s.file, "file", "f", "", "JSON `file` with the configuration, - for stdin; other flags override it")
	f.StringVarP(&s.kernel, "kernel", "k", "",
		"vmlinux or bzImage at `path`; of an image, also the name of one with a kernel, or host")
	f.StringVar(&s.initrd, "initrd", "", "initramfs at `path`")
	f.StringVar(&s.append, "append", "", "kernel command `line`; without it: \""+spec.DefaultBootArgs+"\"")
	f.IntVarP(&s.cpus, "cpus", "c", defaultCPUs, "`number` of CPUs")
	f.VarP(&s.memory, "memory", "m",
		fmt.Sprintf("`size` in MiB, or like 512M or 2G; of an image %d without it", imageMemory))
	f.StringArrayVar(&s.drives, "drive", nil,
		"disk `image`: PATH[:ro][,root][,id=NAME] [,ephemeral=BOOL]; may be repeated")
	f.StringVar(&s.name, "name", "", "a second `handle` for the VM")
	f.StringVar(&s.id, "id", "", "the VM's `id`; without it one is drawn")
	f.StringArrayVarP(&s.labels, "label", "l", nil, "`key=value` to keep with the VM; may be repeated")
	f.StringArrayVar(&s.nets, "net", nil,
		"`network` to be on: bridge (an image's without this, for root), a network's name, bridge:DEV for a bridge of yours, netns[:NAME] for a namespace of its own, tap:DEV or none; then any of ,id=NAME ,ip=ADDRESS ,mac=ADDRESS ,rx=RATE ,tx=RATE; may be repeated")
	f.StringVar(&s.ip, "ip", "",
		"IPv4 `address` that it has on its network; where it is on several: --net NAME,ip=ADDRESS")
	f.StringArrayVarP(&s.publish, "publish", "p", nil, "port of the host that leads to the guest's: `"+PublishForms+
		"`, or ranges of as many; without HOST a free one, see smartvm port; may be repeated")
	f.BoolVarP(&s.publishAll, "publish-all", "P", false,
		"of an image: publish each port that it exposes at a free one of the host")
	f.StringArrayVar(&s.dns, "dns", nil,
		"`address` of a server that answers the guest for names, in place of the host's; may be repeated")
	f.StringArrayVar(&s.search, "dns-search", nil,
		"of an image: `domain` in which its guest looks for names that are not whole; may be repeated")
	f.StringArrayVar(&s.hosts, "add-host", nil,
		"of an image: `NAME:IP` to have in its guest's /etc/hosts, or NAME:host-gateway for the host's address on the network; may be repeated")
	s.policy.Add(f)
	f.StringVar(&s.vsock, "vsock", "", "vsock device with its `socket` at PATH[,cid=N]")
	f.StringArrayVarP(&s.env, "env", "e", nil,
		"of an image: `NAME=VALUE` for what runs in it, or NAME for the value that it has here; may be repeated")
	f.StringArrayVar(&s.envFiles, "env-file", nil,
		"of an image: `file` with NAME=VALUE lines, kept secret; may be repeated, -e counts before it")
	f.StringArrayVar(&s.secrets, "secret", nil,
		"of an image: `NAME=FILE` to have the file as /run/secrets/NAME in it; may be repeated")
	f.StringArrayVarP(&s.volumes, "volume", "v", nil,
		"of an image: give it a copy of a directory or file at each start, `HOST:GUEST[:ro|:sync]`; what is written goes when it stops, or with sync is copied back; NAME:GUEST[:ro], without a slash or dot in front: a disk of that name, which stays; may be repeated")
	f.Var(&s.volumeSize, "volume-size",
		fmt.Sprintf("`size` of the disks that -v NAME:GUEST makes, in MiB or like 10G (default %dG)",
			spec.DefaultVolumeMiB>>10))
	f.BoolVar(&s.sync, "sync", false, "the same as :sync for all volumes without :ro")
	f.StringVar(&s.entrypoint, "entrypoint", "",
		"of an image: `program` to run in place of its own; \"\" for none, nor its command")
	f.StringVar(&s.systemd, "systemd", spec.SystemdTrue,
		"of an image: `when` its command is an init, and boots as process 1: true where it is systemd or /sbin/init, false or always")
	f.StringVarP(&s.user, "user", "u", "", "of an image: `user` that runs it, NAME or UID, and optionally :GROUP")
	f.StringVarP(&s.workdir, "workdir", "w", "", "of an image: `dir` to run it in")
	f.StringVar(&s.hostname, "hostname", "", "of an image: the guest's `name`, if not the VM's")
	f.Var(&s.scratch, "scratch",
		fmt.Sprintf("of an image: `size` of the disk that takes what is written, in MiB or like 10G (default %dG)",
			spec.DefaultScratchMiB>>10))
	f.StringVar(&s.keep, "keep", "", "of an image: keep that disk under a `name`, for the next VM that names it")
}

// Build makes the configuration. Everything wrong with the flags is reported at once, joined; what
// is wrong with the file as *spec.FieldErrors. Stdin is read when that is the file. The arguments
// are an image and a command for it, or none.
func (s *Flags) Build(stdin io.Reader, args []string) (spec.Spec, error) {
	vm := spec.Spec{MachineConfig: spec.MachineConfig{VCPUCount: defaultCPUs, MemSizeMiB: defaultMemory}}
	if s.file != "" {
		var err error
		if vm, err = read(s.file, stdin); err != nil {
			return vm, err
		}
	}
	errs := []error{s.image(&vm, args)}
	for name, set := range map[string]func(){
		"kernel": func() { s.setKernel(&vm) },
		"initrd": func() { vm.BootSource.InitrdPath = s.initrd },
		"append": func() { vm.BootSource.BootArgs = s.append },
		"cpus":   func() { vm.MachineConfig.VCPUCount = s.cpus },
		"memory": func() { vm.MachineConfig.MemSizeMiB = int(s.memory) },
		"name":   func() { vm.Name = s.name },
		"id":     func() { vm.ID = s.id },
	} {
		if s.set.Changed(name) {
			set()
		}
	}
	for _, text := range s.drives {
		errs = append(errs, addDrive(&vm, text))
	}
	own, err := s.policy.Of(vm.Policy)
	vm.Policy = own
	errs = append(errs, err, s.networks(&vm), s.secret(&vm), s.volume(&vm))
	for _, text := range s.labels {
		key, value, _ := strings.Cut(text, "=")
		if vm.Labels == nil {
			vm.Labels = map[string]string{}
		}
		vm.Labels[key] = value
	}
	if s.vsock != "" {
		errs = append(errs, setVsock(&vm, s.vsock))
	}
	return vm, errors.Join(errs...)
}

// image sets what is about an image.
func (s *Flags) image(vm *spec.Spec, args []string) error {
	if len(args) > 0 {
		vm.Image = args[0]
		if rest := args[1:]; len(rest) > 0 {
			if rest[0] == "--" {
				rest = rest[1:]
			}
			vm.Command = rest
		}
		if s.file == "" {
			vm.MachineConfig.MemSizeMiB = imageMemory
		}
	}
	env, err := secret.Variables(s.env, s.LookupEnv)
	vm.Env = append(vm.Env, env...)
	if s.set.Changed("entrypoint") {
		vm.Entrypoint = slices.DeleteFunc([]string{s.entrypoint}, func(e string) bool { return e == "" })
	}
	if s.set.Changed("systemd") {
		vm.Systemd = s.systemd
	}
	for to, from := range map[*string]string{&vm.User: s.user, &vm.WorkingDir: s.workdir, &vm.Hostname: s.hostname} {
		if from != "" {
			*to = from
		}
	}
	if s.scratch > 0 || s.keep != "" {
		vm.Scratch = &spec.Scratch{SizeMiB: int(s.scratch), Keep: s.keep}
	}
	return err
}

// secret sets what is told the guest alone.
func (s *Flags) secret(vm *spec.Spec) error {
	vm.EnvFiles = append(vm.EnvFiles, s.envFiles...)
	var errs []error
	for _, text := range s.secrets {
		name, path, ok := strings.Cut(text, "=")
		if !ok || name == "" || path == "" {
			errs = append(errs, fmt.Errorf("--secret %q: want NAME=FILE", name)) // what stands behind it may be one
		}
		vm.Secrets = append(vm.Secrets, spec.Secret{Name: name, Path: path})
	}
	return errors.Join(errs...)
}

// setKernel takes a file's path for that, and of an image anything else for another image's name.
func (s *Flags) setKernel(vm *spec.Spec) {
	vm.Kernel, vm.BootSource.KernelImagePath = "", s.kernel
	if _, err := os.Stat(s.kernel); vm.Image != "" && err != nil && !strings.Contains(s.kernel, "/") {
		vm.Kernel, vm.BootSource.KernelImagePath = s.kernel, ""
	}
}

func read(path string, stdin io.Reader) (spec.Spec, error) {
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return spec.Spec{}, err
		}
		defer f.Close()
		stdin = f
	}
	data, err := io.ReadAll(io.LimitReader(stdin, spec.MaxBytes+1))
	if err != nil {
		return spec.Spec{}, fmt.Errorf("read %s: %w", path, err)
	}
	return spec.Parse(data)
}

// addDrive adds a drive, or replaces the one with the same id.
func addDrive(vm *spec.Spec, text string) error {
	path, options, _ := strings.Cut(text, ",")
	index := func(id string) int {
		return slices.IndexFunc(vm.Drives, func(d spec.Drive) bool { return d.DriveID == id })
	}
	d := spec.Drive{DriveID: free("drive", index)}
	d.PathOnHost, d.IsReadOnly = strings.CutSuffix(strings.TrimSuffix(path, ":rw"), ":ro")
	err := eachOption(options, "--drive "+text, map[string]func(string) error{
		"id":   func(v string) error { d.DriveID = v; return nil },
		"root": func(v string) (err error) { d.IsRootDevice, err = parseBool(v); return err },
		"ro":   func(v string) (err error) { d.IsReadOnly, err = parseBool(v); return err },
		"ephemeral": func(v string) error {
			own, err := parseBool(v)
			d.Ephemeral = &own
			return err
		},
	})
	if i := index(d.DriveID); i >= 0 {
		vm.Drives[i] = d
	} else {
		vm.Drives = append(vm.Drives, d)
	}
	return err
}

// free returns the first name of this kind that index does not find.
func free(kind string, index func(string) int) string {
	for i := 0; ; i++ {
		if id := fmt.Sprint(kind, i); index(id) < 0 {
			return id
		}
	}
}

func setVsock(vm *spec.Spec, text string) error {
	path, options, _ := strings.Cut(text, ",")
	vm.Vsock = &spec.Vsock{GuestCID: defaultCID, UDSPath: path}
	return eachOption(options, "--vsock "+text, map[string]func(string) error{
		"cid": func(v string) error {
			cid, err := strconv.ParseUint(v, 10, 32)
			vm.Vsock.GuestCID = uint32(cid)
			return err
		},
	})
}

// eachOption parses "name=value,name".
func eachOption(text, where string, options map[string]func(value string) error) error {
	if text == "" {
		return nil
	}
	var errs []error
	for option := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(option, "=")
		set := options[name]
		if set == nil {
			errs = append(errs, fmt.Errorf("%s: unknown option %q", where, name))
			continue
		}
		if err := set(value); err != nil {
			errs = append(errs, fmt.Errorf("%s: option %s: %q makes no sense", where, name, value))
		}
	}
	return errors.Join(errs...)
}

// parseBool takes a bare option for yes.
func parseBool(text string) (bool, error) {
	if text == "" {
		return true, nil
	}
	return strconv.ParseBool(text)
}

// Memory is a flag's size in MiB.
type Memory int

func (m *Memory) String() string { return fmt.Sprint(int(*m)) }

// Type is for pflag.
func (m *Memory) Type() string { return "size" }

// Set parses MiB, or a size like 512M or 2G.
func (m *Memory) Set(text string) error {
	want := errors.New("want MiB, or a size like 512M or 2G")
	number, unit := strings.TrimRight(text, "bBiIgGmM"), uint64(1)
	switch strings.ToLower(strings.TrimPrefix(text, number)) {
	case "", "m", "mb", "mib":
	case "g", "gb", "gib":
		unit = 1 << 10
	default:
		return want
	}
	n, err := strconv.ParseUint(number, 10, 31)
	if err != nil || n*unit > math.MaxInt32 {
		return want
	}
	*m = Memory(n * unit)
	return nil
}

// Seconds is a flag's length of time: a number of seconds, or one like 1m30s.
type Seconds time.Duration

func (s *Seconds) String() string {
	return strconv.FormatFloat(time.Duration(*s).Seconds(), 'f', -1, 64)
}

// Type is for pflag.
func (s *Seconds) Type() string { return "seconds" }

// Set parses text.
func (s *Seconds) Set(text string) error {
	if _, err := strconv.ParseFloat(text, 64); err == nil {
		text += "s"
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return errors.New("want seconds, or a time like 1m30s")
	}
	*s = Seconds(d)
	return nil
}
