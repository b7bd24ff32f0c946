package base_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image/base"
)

// The kernel comes alone, and where its base image is here it is not fetched at all, offline
// neither.
func TestKernel(t *testing.T) {
	b := newBucket(t, train("v1.16"))
	o := options(t, b, "v1.16.1")
	s := open(t, o)
	const url = "/bucket/firecracker-ci/v1.16/x86_64/vmlinux-6.1.141"
	wants := func(s *base.Store, fetched ...string) {
		t.Helper()
		var got []byte
		err := s.Kernel(t.Context(), func(path, source string) (err error) {
			if source != b.URL+url {
				t.Errorf("it is said to be of %s", source)
			}
			got, err = os.ReadFile(path)
			return err
		})
		if err != nil || string(got) != "kernel v1.16" {
			t.Errorf("got %q, %v", got, err)
		}
		if diff := cmp.Diff(fetched, b.gets()); diff != "" {
			t.Errorf("fetched, -want +got:\n%s", diff)
		}
	}
	offline := o
	offline.Offline = true
	none := open(t, offline)
	if err := none.Kernel(t.Context(), func(string, string) error { return nil }); !errors.Is(err, base.ErrOffline) {
		t.Errorf("offline: %v", err)
	}
	wants(s, "vmlinux-6.1.141")
	if entries, err := os.ReadDir(filepath.Join(o.Dir, ".work")); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	ensure(t, s, base.Latest)
	b.gets()
	wants(s)
	wants(none)
	refused := errors.New("refused")
	if err := s.Kernel(t.Context(), func(string, string) error { return refused }); !errors.Is(err, refused) {
		t.Errorf("what cannot be taken: %v", err)
	}
}
