package catalog_test

import (
	"cmp"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/catalog"
	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/spec"
)

// The default network has the settings that it was given until it has some of its own, and the
// host's policy as long as it has none.
func TestStore_Default(t *testing.T) {
	standard, err := network.NewDefault("", "")
	if err != nil {
		t.Fatal(err)
	}
	host := &policy.Policy{DefaultAction: policy.Deny}
	standard.MaxConnections, standard.Policy = 7, host
	s := &catalog.Store{Dir: filepath.Join(t.TempDir(), "networks"), Default: standard}
	c, err := s.Get(standard.Name)
	if err != nil || c.MaxConnections != 7 || c.Policy != host || !c.HostPolicy {
		t.Errorf("before any change: %+v, %v", c, err)
	}
	own := &policy.Policy{DefaultAction: policy.Allow}
	for _, want := range []*policy.Policy{own, nil} {
		c, err := s.Update(standard.Name, func(c *network.Settings) { c.Policy = want })
		if err != nil || c.MaxConnections != 7 || c.HostPolicy != (want == nil) || c.Policy != cmp.Or(want, host) {
			t.Errorf("with the policy %v: %+v, %v", want, c, err)
		}
	}
}

// A network that another version of smartvm has written hides no other, and is not used without
// what is unknown of it.
func TestStore_OtherVersions(t *testing.T) {
	standard, err := network.NewDefault("", "")
	if err != nil {
		t.Fatal(err)
	}
	s := &catalog.Store{Dir: filepath.Join(t.TempDir(), "networks"), Default: standard}
	for _, name := range []string{"alpha", "beta", "gamma"} {
		if _, err := s.Create(network.Config{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(s.Dir, "beta.json")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	newer := strings.Replace(string(text), "{", `{"quarantine": true,`, 1)
	if err := os.WriteFile(path, []byte(newer), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := s.List()
	if !errors.Is(err, spec.ErrNotSupported) || !strings.Contains(err.Error(), path) ||
		!strings.Contains(err.Error(), "quarantine") {
		t.Errorf("%v, want ErrNotSupported of %s", err, path)
	}
	var names []string
	for _, c := range all {
		names = append(names, c.Name)
	}
	if got := strings.Join(names, " "); got != s.Default.Name+" alpha gamma" {
		t.Errorf("listed: %s, want all others", got)
	}
	if _, err := s.Get("beta"); !errors.Is(err, spec.ErrNotSupported) {
		t.Errorf("get: %v, want ErrNotSupported", err)
	}
	if _, err := s.Get("gamma"); err != nil {
		t.Error(err)
	}
	// Which subnet beta has is not known.
	delta := network.Config{Name: "delta", Subnet: netip.MustParsePrefix("10.250.0.0/24")}
	if _, err := s.Create(delta); !errors.Is(err, spec.ErrNotSupported) {
		t.Errorf("create: %v, want ErrNotSupported", err)
	}
	if _, err := s.Update("beta", func(c *network.Settings) {
		c.MaxConnections = 9
	}); !errors.Is(err, spec.ErrNotSupported) {
		t.Errorf("update: %v, want ErrNotSupported", err)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != newer {
		t.Errorf("it is %s now, %v", after, err)
	}
	if err := s.Remove("beta"); err != nil {
		t.Error(err)
	}
	if _, err := s.List(); err != nil {
		t.Error(err)
	}
}
