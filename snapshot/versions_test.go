package snapshot_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/internal/sealed"
	"push.rocks/smartvm/snapshot"
	"push.rocks/smartvm/spec"
)

// A snapshot that another version of smartvm has made is not damaged, but not used either; it hides
// no other, and stays until somebody removes it.
func TestStore_OtherVersions(t *testing.T) {
	s := open(t)
	ours := commit(t, s, "ours")
	var newer []*snapshot.Snapshot
	for i, with := range []string{`{"version":7,"files":[],`, `{"encrypted":true,`} {
		sn := commit(t, s, []string{"one", "two"}[i])
		path := filepath.Join(sn.Dir(), "manifest.json")
		text, err := os.ReadFile(path)
		must(t, err)
		text = bytes.Replace(text[:bytes.LastIndex(text, []byte(`,"sum":`))], []byte("{"), []byte(with), 1)
		if i == 0 {
			text = bytes.Replace(text, []byte(`"version":1,`), nil, 1)
		}
		must(t, os.WriteFile(path, sealed.Seal(append(text, '}')), 0o600))
		newer = append(newer, sn)
	}
	all, err := s.List()
	if len(all) != 1 || all[0].ID != ours.ID {
		t.Errorf("listed: %v, want %s", all, ours.ID)
	}
	for _, sn := range newer {
		for what, err := range map[string]error{"list": err, "check": sn.Check(t.Context())} {
			if !errors.Is(err, spec.ErrNotSupported) || errors.Is(err, snapshot.ErrDamaged) ||
				!strings.Contains(err.Error(), sn.ID) {
				t.Errorf("%s: %v, want ErrNotSupported of %s", what, err, sn.ID)
			}
		}
		_, err := s.Get(sn.ID)
		wantError(t, "get", err, spec.ErrNotSupported)
	}
	if sn, err := s.Get("ours"); err != nil || sn.ID != ours.ID {
		t.Errorf("by name: %v", err)
	}
	removed, err := s.Prune(t.Context(), nil)
	if err != nil || len(removed) != 1 || removed[0] != ours.ID {
		t.Errorf("pruned %v, %v, want %s", removed, err, ours.ID)
	}
	for _, sn := range newer {
		must(t, s.Remove(t.Context(), sn.ID, false))
	}
	wantIDs(t, s)
}
