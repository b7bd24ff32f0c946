// Package resolve finds what a configuration names on its host.
package resolve

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/configure"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/spec"
)

// Spec makes the paths of s absolute and checks s against the host and the VMM's version. It
// reports everything at once. Extract says that the kernel is packed: a bzImage, say.
func Spec(s *spec.Spec, v firecracker.Version, ephemeral bool) (extract bool, err error) {
	r := resolver{}
	s.BootSource.KernelImagePath = r.file("bootSource.kernelImagePath", s.BootSource.KernelImagePath, unix.R_OK)
	if r.errs == nil {
		info, err := kernel.Check(s.BootSource.KernelImagePath)
		if err != nil {
			r.add("bootSource.kernelImagePath", s.BootSource.KernelImagePath, err)
		}
		extract = info.Packed
	}
	if s.BootSource.InitrdPath != "" {
		s.BootSource.InitrdPath = r.file("bootSource.initrdPath", s.BootSource.InitrdPath, unix.R_OK)
	}
	// The slices are the caller's: what is changed is a copy.
	s.Drives = append([]spec.Drive(nil), s.Drives...)
	for i := range s.Drives {
		d := &s.Drives[i]
		if d.CacheType == "" && !d.IsReadOnly && !stage.Wanted(ephemeral, d.IsReadOnly, d.Ephemeral) {
			d.CacheType = "Writeback" // what the guest has synced outlives the host's crash too
		}
		d.PathOnHost = r.file(fmt.Sprintf("drives[%d].pathOnHost", i), d.PathOnHost,
			access(ephemeral, d.IsReadOnly, d.Ephemeral))
	}
	s.Pmem = append([]spec.Pmem(nil), s.Pmem...)
	for i := range s.Pmem {
		d := &s.Pmem[i]
		d.PathOnHost = r.file(fmt.Sprintf("pmem[%d].pathOnHost", i), d.PathOnHost,
			access(ephemeral, d.IsReadOnly, d.Ephemeral))
	}
	if s.Vsock != nil {
		vsock := *s.Vsock
		if vsock.UDSPath != "" {
			vsock.UDSPath = r.abs(vsock.UDSPath)
		}
		s.Vsock = &vsock
	}
	if s.Logger != nil && s.Logger.LogPath != "" {
		logger := *s.Logger
		logger.LogPath = r.abs(logger.LogPath)
		s.Logger = &logger
	}
	if s.Metrics != nil {
		m := *s.Metrics
		m.MetricsPath = r.abs(m.MetricsPath)
		s.Metrics = &m
	}
	if need := (firecracker.Version{Major: 1, Minor: 13}); s.PCI && !v.AtLeast(need) {
		r.errs = append(r.errs,
			tooOld(fmt.Errorf("%w: pci needs Firecracker %s or newer, this is %s", spec.ErrNotSupported, need, v)))
	}
	for _, c := range configure.Calls(s, v) {
		r.errs = append(r.errs, versionErrors(c, v)...)
	}
	return extract, errors.Join(r.errs...)
}

// versionErrors says what of a call the VMM is too old for.
func versionErrors(c configure.Call, v firecracker.Version) []error {
	err := firecracker.CheckVersion(v, c.Body)
	if err == nil {
		return nil
	}
	return []error{tooOld(fmt.Errorf("%w: %w", spec.ErrNotSupported, err))}
}

func tooOld(err error) error { return hint.Add(err, "use a newer Firecracker, or leave the field out") }

func access(ephemeral, readOnly bool, own *bool) uint32 {
	if readOnly || stage.Wanted(ephemeral, readOnly, own) {
		return unix.R_OK
	}
	return unix.R_OK | unix.W_OK
}

type resolver struct{ errs []error }

func (r *resolver) add(path, value string, err error) {
	reason := err
	var pe *fs.PathError
	if errors.As(err, &pe) { // its path is the value
		reason = pe.Err
	}
	r.errs = append(r.errs, &spec.FieldError{Path: path, Value: value, Reason: reason.Error(), Err: err})
}

func (r *resolver) abs(path string) string {
	abs, err := filepath.Abs(path)
	if err != nil {
		r.errs = append(r.errs, err)
	}
	return abs
}

// file resolves a path and checks that there is a file or block device, with the rights wanted.
func (r *resolver) file(field, path string, mode uint32) string {
	abs := r.abs(path)
	real, err := filepath.EvalSymlinks(abs)
	if err != nil {
		r.add(field, path, err)
		return abs
	}
	fi, err := os.Stat(real)
	switch {
	case err != nil:
		r.add(field, path, err)
	case fi.Mode().IsRegular(), fi.Mode()&fs.ModeType == fs.ModeDevice:
		if err := unix.Access(real, mode); err != nil {
			r.add(field, path, err)
		}
	default:
		r.add(field, path, errors.New("neither a file nor a block device"))
	}
	return real
}
