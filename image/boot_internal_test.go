package image

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/spec"
)

func TestGuestConfig_Command(t *testing.T) {
	c := oci.Config{Entrypoint: []string{"/entry", "-e"}, Cmd: []string{"cmd"}}
	for name, tt := range map[string]struct {
		o    BootOptions
		want []string
	}{
		"the image's":         {BootOptions{}, []string{"/entry", "-e", "cmd"}},
		"command":             {BootOptions{Command: []string{"a", "b"}}, []string{"/entry", "-e", "a", "b"}},
		"entrypoint":          {BootOptions{Entrypoint: []string{"/x"}}, []string{"/x"}},
		"both":                {BootOptions{Entrypoint: []string{"/x"}, Command: []string{"a"}}, []string{"/x", "a"}},
		"cleared":             {BootOptions{Entrypoint: []string{}, Command: []string{"a"}}, []string{"a"}},
		"cleared as docker's": {BootOptions{Entrypoint: []string{""}, Command: []string{"a"}}, []string{"a"}},
	} {
		got := guestConfig(&Boot{Image: &Image{Config: c}}, tt.o)
		if diff := cmp.Diff(tt.want, got.Command); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
		if got.Init {
			t.Errorf("%s: it is process 1", name)
		}
	}
}

// What an image says is done as docker does it, also where it says it oddly.
func TestGuestConfig_Image(t *testing.T) {
	c := oci.Config{
		Cmd: []string{"a"}, Env: []string{"A=1", "B", "=x", "C="}, User: "web:", WorkingDir: "srv/../app/",
		StopSignal: "SIGRTMIN+3", Volumes: []string{"/data", "/y"},
	}
	got := guestConfig(&Boot{Image: &Image{Config: c}}, BootOptions{Env: []string{"D=2"}})
	want := &guest.Boot{
		RootDevice: rootDevice, ScratchDevice: scratchDevice, Command: []string{"a"}, Env: []string{"A=1", "C=", "D=2"},
		User: "web:", WorkingDir: "/app",
		StopSignal: "SIGRTMIN+3", Directories: []string{"/data", "/y"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	got.RootType = guest.Ext4
	if _, err := got.Encode(); err != nil {
		t.Error(err)
	}
	for signal, want := range map[string]string{"SIGNOTHING": "", "": "", "9": "9", "SIGINT": "SIGINT"} {
		c.StopSignal = signal
		if got := guestConfig(&Boot{Image: &Image{Config: c}}, BootOptions{WorkingDir: "/w"}); got.StopSignal != want ||
			got.WorkingDir != "/w" {
			t.Errorf("%q: got %q in %q", signal, got.StopSignal, got.WorkingDir)
		}
	}
}

func TestGuestConfig_Init(t *testing.T) {
	type row struct {
		command []string
		systemd string
		want    bool
	}
	inits := [][]string{
		{"/sbin/init"},
		{"/usr/sbin/init"},
		{"/usr/local/sbin/init"},
		{"systemd"},
		{"/lib/systemd/systemd", "--unit=rescue.target"},
		{"/bin/sh", "-c", "/usr/sbin/init"},
	}
	others := [][]string{
		{"/bin/bash"},
		{"init"},
		{"/init"},
		{"/bin/init"},
		{"/opt/sbin/init"},
		{"/usr/bin/systemd-run"},
		{"/bin/sh", "-c"},
		{"/bin/bash", "-c", "/sbin/init"},
		{"env", "/sbin/init"},
	}
	rows := []row{{nil, spec.SystemdAlways, false}} // the image's own init is, whatever is asked for
	for _, c := range inits {
		rows = append(rows, row{c, "", true}, row{c, spec.SystemdTrue, true}, row{c, spec.SystemdFalse, false},
			row{c, spec.SystemdAlways, true})
	}
	for _, c := range others {
		rows = append(rows, row{c, "", false}, row{c, spec.SystemdTrue, false}, row{c, spec.SystemdFalse, false},
			row{c, spec.SystemdAlways, true})
	}
	for _, r := range rows {
		// It makes no difference who says what the command is.
		got := guestConfig(&Boot{Image: &Image{Config: oci.Config{Cmd: r.command}}}, BootOptions{Systemd: r.systemd})
		given := guestConfig(&Boot{Image: &Image{}}, BootOptions{Command: r.command, Systemd: r.systemd})
		if got.Init != r.want || given.Init != r.want {
			t.Errorf("%q with --systemd %q: got %v and %v, want %v", r.command, r.systemd, got.Init, given.Init, r.want)
		}
		if given.HasInit() != (r.want || len(r.command) == 0) {
			t.Errorf("%q: HasInit is %v", r.command, given.HasInit())
		}
	}
}

// An image's entrypoint may go before the init that is its own last argument.
func TestGuestConfig_Prepared(t *testing.T) {
	entry := []string{"/entrypoint"}
	for name, tt := range map[string]struct {
		c    oci.Config
		o    BootOptions
		want bool
	}{
		"kind":    {oci.Config{Entrypoint: []string{"/entrypoint", "/sbin/init"}}, BootOptions{}, true},
		"command": {oci.Config{Entrypoint: entry, Cmd: []string{"/lib/systemd/systemd"}}, BootOptions{}, true},
		"against it": {
			oci.Config{Entrypoint: entry, Cmd: []string{"/sbin/init"}},
			BootOptions{Systemd: spec.SystemdFalse},
			false,
		},
		"another command": {
			oci.Config{Entrypoint: entry, Cmd: []string{"/sbin/init"}},
			BootOptions{Command: []string{"sh"}},
			false,
		},
		"a file's name":   {oci.Config{Entrypoint: []string{"cat"}}, BootOptions{Command: []string{"/sbin/init"}}, false},
		"no entrypoint":   {oci.Config{Cmd: []string{"ls", "/sbin/init"}}, BootOptions{}, false},
		"an unclear name": {oci.Config{Entrypoint: entry, Cmd: []string{"systemd"}}, BootOptions{}, false},
		"another entry": {
			oci.Config{Entrypoint: entry, Cmd: []string{"/sbin/init"}},
			BootOptions{Entrypoint: []string{"/x"}},
			false,
		},
		"not its last one": {oci.Config{Entrypoint: entry, Cmd: []string{"/sbin/init", "-v"}}, BootOptions{}, false},
	} {
		if got := guestConfig(&Boot{Image: &Image{Config: tt.c}}, tt.o); got.Init != tt.want {
			t.Errorf("%s: got %v, want %v", name, got.Init, tt.want)
		}
	}
}
