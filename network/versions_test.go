package network_test

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/network"
	"push.rocks/smartvm/spec"
)

// What another version of smartvm has brought up is not taken down by who does not know what that
// did to the host, and the host goes on forwarding for it.
func TestSweep_OtherVersions(t *testing.T) {
	line := func(body string) string { return fmt.Sprintf("%08x %s\n", crc32.ChecksumIEEE([]byte(body)), body) }
	newer := line(`{"kind":"tunnel","effect":{"name":"x"}}`)
	for name, tt := range map[string]struct {
		users                bool
		up, journal          string
		stays, notSupported  bool
		forwardingStays      bool
		forwardingJournalHas string
	}{
		"nobody uses it": {up: `{"owner":"a","network":{"name":"n"}}`},
		"a newer journal": {
			up: `{"owner":"a","network":{"name":"n"}}`, journal: newer, stays: true, notSupported: true,
			forwardingStays: true,
		},
		"a newer state": {
			up: `{"owner":"a","network":{"name":"n"},"shaped":true}`, users: true, stays: true,
			forwardingStays: true,
		},
		"a newer, of no VM": {up: `{"owner":"a","network":{"name":"n"},"shaped":true}`},
		"it has other needs": {
			up: `{"owner":"a","network":{"name":"n"}}`, forwardingJournalHas: newer, notSupported: true,
			forwardingStays: true,
		},
		"it is used, and known": {
			up: `{"owner":"a","network":{"name":"n"}}`, users: true, stays: true,
			forwardingStays: true,
		},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "networks")
			up, forwarding := filepath.Join(dir, "n", "up.json"), filepath.Join(dir, "forwarding.journal")
			err := errors.Join(os.MkdirAll(filepath.Join(dir, "n", "users"), 0o700), os.WriteFile(up, []byte(tt.up), 0o600),
				os.WriteFile(filepath.Join(dir, "n", "journal"), []byte(tt.journal), 0o600),
				os.WriteFile(forwarding, []byte(tt.forwardingJournalHas), 0o600))
			if tt.users {
				err = errors.Join(err, os.Symlink(dir, filepath.Join(dir, "n", "users", "vm")))
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := network.Sweep(t.Context(), dir); errors.Is(err, spec.ErrNotSupported) != tt.notSupported ||
				(err != nil) != tt.notSupported {
				t.Errorf("%v, want ErrNotSupported: %v", err, tt.notSupported)
			}
			for path, stays := range map[string]bool{up: tt.stays, forwarding: tt.forwardingStays} {
				if _, err := os.Stat(path); stays && err != nil || !stays && !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s: %v, want it there: %v", path, err, stays)
				}
			}
		})
	}
}
