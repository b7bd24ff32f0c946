package atomicfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/spec"
)

type record struct {
	Version int      `json:"version"`
	Name    string   `json:"name"`
	Parts   []string `json:"parts"`
}

func TestReadJSON(t *testing.T) {
	const limit = 200
	for name, tt := range map[string]struct {
		text   string
		newest int
		want   record
		err    string // a part of it, "" for none
	}{
		"as written":              {`{"version":2,"name":"a","parts":["b"]}`, 2, record{2, "a", []string{"b"}}, ""},
		"an older one":            {`{"version":1,"name":"a"}`, 2, record{1, "a", nil}, ""},
		"a field that came later": {`{"version":2,"name":"a","later":{"x":[1]}}`, 2, record{2, "a", nil}, ""},
		"a newer one": {
			`{"version":3,"name":"a"}`, 2,
			record{},
			"it has version 3, this smartvm reads version 2",
		},
		"a newer one that differs in kind": {
			`{"version":3,"name":{"first":"a"},"later":1}`, 2, record{}, "version 3",
		},
		"without versions": {`{"name":"a","later":1}`, 0, record{0, "a", nil}, ""},
		"another type":     {`{"version":2,"name":1}`, 2, record{}, "cannot unmarshal"},
		"cut short":        {`{"version":2,"na`, 2, record{}, "unexpected end"},
		"too long":         {`{"version":2,"name":"` + strings.Repeat("a", limit) + `"}`, 2, record{}, "more than 200 bytes"},
	} {
		path := filepath.Join(t.TempDir(), "record.json")
		if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := atomicfile.ReadJSON[record](path, limit, tt.newest)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
		if (err == nil) != (tt.err == "") || err != nil &&
			(!strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), path)) {
			t.Errorf("%s: %v, want %q of %s", name, err, tt.err, path)
		}
		if newer := strings.Contains(tt.err, "version 3"); errors.Is(err, spec.ErrNotSupported) != newer {
			t.Errorf("%s: %v, want ErrNotSupported: %v", name, err, newer)
		}
	}
	if _, err := atomicfile.ReadJSON[record](filepath.Join(t.TempDir(), "none"), limit, 1); !errors.Is(err,
		fs.ErrNotExist) {
		t.Errorf("%v, want fs.ErrNotExist", err)
	}
}
