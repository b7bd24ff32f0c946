package vmm_test

import (
	"context"
	"errors"
	"io"
	"syscall"
	"testing"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/vmm"
)

// How an adopted VMM ends is known where the kernel tells it, and not mistaken where there are
// several processes.
func TestAdopt_Exit(t *testing.T) {
	told := testenv.ForeignExits(t)
	if !told {
		t.Log("this kernel does not tell when the parent was faster")
	}
	for name, tt := range map[string]struct {
		script string
		end    func(*vmm.Process, io.Writer) error
		want   vmm.Exit
	}{
		"exits":  {"echo up\nread x\nexit 7\n", typed, vmm.Exit{Known: true, Code: 7}},
		"killed": {forever, killed, vmm.Exit{Known: true, Code: -1, Signal: syscall.SIGKILL}},
		"two":    {"sleep 1000 &\necho up\nread x\nkill $!\nexit 7\n", typed, vmm.Exit{}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStand(t, tt.script)
			s.start(t)
			s.up(t)
			s.Release()
			config := *s.config
			config.Streams = vmm.Streams{Console: new(sink), Log: new(sink)}
			p, err := vmm.Adopt(&config)
			if err != nil {
				t.Fatal(err)
			}
			in, err := vmm.OpenInput(config.Dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(tt.end(p, in), in.Close()); err != nil {
				t.Fatal(err)
			}
			<-p.Done()
			if got := p.Exit(); got != tt.want && (told || got != vmm.Exit{}) {
				t.Errorf("adopted, it ended %+v, want %+v", got, tt.want)
			}
			<-s.Done()
			if got := s.Exit(); !got.Known || tt.want.Known && got != tt.want {
				t.Errorf("its parent saw %+v, want %+v", got, tt.want)
			}
		})
	}
}

func killed(p *vmm.Process, _ io.Writer) error { return p.Revert(context.Background()) }

func typed(_ *vmm.Process, in io.Writer) error {
	_, err := io.WriteString(in, "go\n")
	return err
}
