package vmflags

import (
	"errors"
	"fmt"
	"strings"

	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/spec"
)

// volume sets what the guest has of the host's directories and named volumes. As with docker, what
// could be a name is one: a directory here is ./name.
func (s *Flags) volume(vm *spec.Spec) error {
	var errs []error
	for _, text := range s.volumes {
		errs = append(errs, s.addVolume(vm, text))
	}
	for i := range vm.Volumes {
		if v := &vm.Volumes[i]; s.sync && !v.ReadOnly {
			v.Sync = true
		}
	}
	if s.sync && len(vm.Volumes) == 0 {
		errs = append(errs, errors.New("--sync: there are no volumes that are copied"))
	}
	if s.volumeSize > 0 && len(vm.NamedVolumes) == 0 {
		errs = append(errs, errors.New("--volume-size: there are no volumes with a name"))
	}
	return errors.Join(errs...)
}

func (s *Flags) addVolume(vm *spec.Spec, text string) error {
	parts := append(strings.Split(text, ":"), "")
	source, target, option := parts[0], parts[1], ""
	if len(parts) == 4 {
		option = parts[2]
	}
	if len(parts) < 3 || len(parts) > 4 || source == "" || target == "" {
		return fmt.Errorf("-v %q: want HOST:GUEST[:ro|:sync] or NAME:GUEST[:ro]", text)
	}
	isNamed := volume.ValidName(source) == nil
	if option != "" && option != "rw" && option != "ro" && (option != "sync" || isNamed) {
		why := ""
		if isNamed && option == "sync" {
			why = fmt.Sprintf(": what is written to a named volume stays; a directory here is ./%s", source)
		}
		return fmt.Errorf("-v %q: unknown option %q%s", text, option, why)
	}
	if len(target) > 1 {
		target = strings.TrimRight(target, "/")
	}
	if isNamed {
		vm.NamedVolumes = append(vm.NamedVolumes,
			spec.NamedVolume{Name: source, Target: target, ReadOnly: option == "ro", SizeMiB: int(s.volumeSize)})
	} else {
		vm.Volumes = append(vm.Volumes,
			spec.Volume{Source: source, Target: target, ReadOnly: option == "ro", Sync: option == "sync"})
	}
	return nil
}
