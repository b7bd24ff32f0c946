package vmflags_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"push.rocks/smartvm/internal/vmflags"
	"push.rocks/smartvm/spec"
)

// What could be a name is one, as with docker; all else is a path.
func TestFlags_Volumes(t *testing.T) {
	build := func(args ...string) (spec.Spec, error) {
		var f vmflags.Flags
		set := pflag.NewFlagSet("run", pflag.ContinueOnError)
		f.Add(set)
		if err := set.Parse(args); err != nil {
			t.Fatal(err)
		}
		return f.Build(strings.NewReader(""), []string{"app"})
	}
	vm, err := build("-v", "db:/data/", "-v", "./db:/src:ro", "-v", "log.1:/log:ro", "-v", "../x:/x:sync", "-v", ".:/y",
		"-v", "~:/z:rw", "--volume-size", "2G")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(
		[]spec.NamedVolume{
			{Name: "db", Target: "/data", SizeMiB: 2048},
			{Name: "log.1", Target: "/log", SizeMiB: 2048, ReadOnly: true},
		}, vm.NamedVolumes); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if diff := cmp.Diff([]spec.Volume{
		{Source: "./db", Target: "/src", ReadOnly: true},
		{Source: "../x", Target: "/x", Sync: true},
		{Source: ".", Target: "/y"},
		{Source: "~", Target: "/z"},
	}, vm.Volumes); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if vm, err := build("-v", "db:/data", "-v", "./src:/src", "--sync"); err != nil || !vm.Volumes[0].Sync ||
		len(vm.NamedVolumes) != 1 {
		t.Errorf("--sync with a volume that has a name: %+v, %v", vm, err)
	}
	for text, want := range map[string]string{
		"-v db": "want HOST:GUEST", "-v db:": "want HOST:GUEST", "-v db:/a:ro:x": "want HOST:GUEST",
		"-v db:/a:sync":   "a directory here is ./db",
		"-v db:/a --sync": "no volumes that are copied", "-v ./a:/a --volume-size 1G": "no volumes with a name",
	} {
		if _, err := build(strings.Fields(text)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
